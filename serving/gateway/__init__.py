"""HTTP in front of a Triton server: a page for people, JSON for programs, and what a server on a
network needs.

settings -> errors -> form, picture, turns, upstream, records -> app.
"""

from regionspot.serving.gateway.app import make_app, run
from regionspot.serving.gateway.settings import GatewaySettings

__all__ = ["GatewaySettings", "make_app", "run"]
