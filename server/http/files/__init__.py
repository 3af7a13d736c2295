"""Keeps the files of /v1/files: the inputs that clients upload for batches, and the results of batches.

The module table.py has the SQL, store.py the interface that the routes use, and upload.py reads an upload.
"""
