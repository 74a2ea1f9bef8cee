"""Data: published folders or embedded rooms -> TFDS array_record -> Grain batches."""
