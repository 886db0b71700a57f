"""Colours of all figures in the guide. One colour means one thing on all pages."""

INK, GREY, LIGHT, PALE = "#1f2430", "#6b7280", "#d7dbe2", "#f3f5f8"
SOURCE = "#1b6ca8"  # encoder, keys, source side
TARGET = "#c2571a"  # decoder, queries, target side
ATTENTION = "#7a3e9d"  # weights and what they sum
GOOD, BAD = "#2a7f62", "#b3261e"  # with and without what a page is about
CYCLE = [SOURCE, TARGET, GOOD, ATTENTION, "#a3862a", "#4a4e58"]
HEAT = "Purples"  # attention weights, 0 to 1
SIGNED = "RdBu_r"  # scores around 0
