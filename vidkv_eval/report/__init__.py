"""From measured cells to a printed table. Files are the border: nothing here loads torch or a model."""
