"""Files with sessions, which move to another server: the stored responses, and segments of the prefix cache."""
