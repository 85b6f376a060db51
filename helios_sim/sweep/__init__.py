"""Many designs of one policy under the same requests: grids and searches, here or on a cluster, and their front."""
