"""`python -m embedpool` is the `embedpool` command."""

from embedpool.cli import main

raise SystemExit(main())
