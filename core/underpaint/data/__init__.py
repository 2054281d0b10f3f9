"""From a data source to batches: decoding, order, crops, loaders. Knows the dataset interface, no concrete source."""
