"""The two halves of a k-means iteration: nearest centroids and means of clusters, in torch and in Triton.

Nothing here knows what is clustered.
"""
