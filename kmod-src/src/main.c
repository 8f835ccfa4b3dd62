// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The module: parameters, loading and unloading.
 */
#include <linux/module.h>

#include "remote_ram.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

unsigned int rram_busy_poll_us;
module_param_named(busy_poll_us, rram_busy_poll_us, uint, 0644);
MODULE_PARM_DESC(busy_poll_us,
		 "Microseconds for which a faulting thread spins before it sleeps (default 0; for sessions begun after a change)");

bool rram_sink_keys;
module_param_named(sink_keys, rram_sink_keys, bool, 0644);
MODULE_PARM_DESC(sink_keys,
		 "Use a memory key of its own for every page that is fetched, as hardware iWARP needs (default N; for connections made after a change)");

static int __init rram_init(void)
{
	int err;

	rram_debug_init();
	err = rram_link_init();
	if (err)
		goto debug;
	err = rram_fs_init();
	if (!err)
		return 0;
	rram_link_exit();
debug:
	rram_debug_exit();
	return err;
}

static void __exit rram_exit(void)
{
	rram_fs_exit();
	rram_link_exit();
	rram_debug_exit();
	/* Sessions are freed after a grace period. */
	rcu_barrier();
}

module_init(rram_init);
module_exit(rram_exit);

MODULE_AUTHOR("The hecaton.fleet authors");
MODULE_DESCRIPTION("Guest RAM whose pages arrive over RDMA");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
MODULE_SOFTDEP("pre: rdma_cm");
