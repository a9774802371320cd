"""Reports: one data structure, and the pages and tables made of it.

Nothing here measures: it is given numbers.
"""
