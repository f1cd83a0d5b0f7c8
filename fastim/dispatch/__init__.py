"""The tier that stores every message, decides where it goes, retries and pushes. Never touches a socket."""
