"""The ten kinds of component and the data that passes between them. Knows nothing else of the project."""
