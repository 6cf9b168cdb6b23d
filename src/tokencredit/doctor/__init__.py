"""Checks of an installation: packages, launchers, and the hosts' interfaces."""
