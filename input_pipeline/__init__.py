"""Data: published folders or embedded frames -> TFDS array_record -> Grain batches."""
