"""python -m cpr_agent: cpr-agentd, as it is started. Guests may wait for it."""

import gc

gc.disable()  # until it is ready (cpr_agent.daemon): nothing that is imported becomes garbage

from cpr_agent.daemon import main  # noqa: E402 - after that

main()
