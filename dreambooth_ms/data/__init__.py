"""From folders of pictures to batches of rows."""
