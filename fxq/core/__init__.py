"""The graph on its way: recipe, plans, stages, rules and the pipeline that every room above speaks in.

Nothing here knows a pass, a model, a file format or how a graph is captured.
"""
