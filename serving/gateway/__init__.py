"""HTTP in front of a Triton server: a page for people, JSON for programs, and what a server on a
network needs.

settings -> errors -> sites, handles, tokens, admission, form, upstream -> fleet,
vocabulary_folder -> vocabularies, records, openapi -> exchange -> app; connections -> serve.
"""

from regionspot.serving.gateway.app import make_app
from regionspot.serving.gateway.serve import make_server, run
from regionspot.serving.gateway.settings import GatewaySettings, TlsFiles

__all__ = ["GatewaySettings", "TlsFiles", "make_app", "make_server", "run"]
