"""What is measured on a machine with one GPU: `benchmarks/accelerator.sh` runs all of it, each part in its own process.

Each part prints Markdown, and adds the figures to a file of JSON lines as soon as they are known. So a part that its
time limit ends has lost nothing of what it measured.
"""
