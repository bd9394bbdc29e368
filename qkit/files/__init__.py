"""The only readers and writers of files: checkpoints, records, job folders, texts."""
