"""The laws of a reversible block, one a file; `memcnn.testing` has their public names."""
