"""Images and the frozen vision towers: decoding, preprocessing, grid features."""
