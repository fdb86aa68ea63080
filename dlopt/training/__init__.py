"""The trainer: how a run is built, looped, evaluated, saved and summarized."""
