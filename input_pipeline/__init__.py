"""Input pipeline: published folders or embedded data -> TFDS array_record -> Grain batches."""
