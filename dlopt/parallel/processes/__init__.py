"""The processes of a parallel run: rank detection, rendezvous, launch, hung ranks."""
