"""Keeps responses of /v1/responses, so that a later request can continue them (`previous_response_id`) or read them.

The module database.py has the SQL, and sqlite.py opens the database. The module responses.py has the interface that the
routes use.
"""
