"""Functions from arrays to arrays: the reference of each operation, its faster forms, and the choice by platform."""
