"""Healing: training that gives a converted model back what the surgery took. Nothing heavy is imported here."""
