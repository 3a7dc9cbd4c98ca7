"""From a manifest to batches of uint8 clips: reading, sampling, decoding, quarantine."""
