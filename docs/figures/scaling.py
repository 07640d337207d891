"""Speed-up and efficiency by the number of GPUs, from the cost model."""

import json

import page

page.draw(json.loads(page.RUN.read_text(encoding="utf-8")))
