"""The disk tier of the prefix cache: its files, and the threads that read and write them. Works without torch."""
