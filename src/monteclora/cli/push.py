"""``monteclora push``."""

from __future__ import annotations

from monteclora.cli.output import Flag, Json, print_json, print_line

__all__ = ["push"]


def push(run: str, name: str, /, *, private: Flag = False, as_json: Json = False) -> None:
    """Put what a run trained on the Hugging Face hub, with a filled model card.

    Sends what export --format adapter writes: weights, posterior, tokenizer, label names and the card.

    Args:
        run: a run folder.
        name: of the repository, owner/name; it is made where there is none.
        private: make it private.
    """
    from monteclora.runs.publishing import push_to_hub

    address = push_to_hub(run, name, private=private)
    if as_json:
        print_json({"address": address, "repository": name})
        return
    print_line(address)
