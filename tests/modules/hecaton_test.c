// SPDX-License-Identifier: GPL-2.0-or-later
/* A kernel module for the tests of kmod_build and kmod: it does nothing, and hecaton_user keeps it in use. */
#include <linux/init.h>
#include <linux/module.h>
#include <linux/moduleparam.h>

#ifdef BROKEN
#error "broken, as a test asks for"
#endif

static int window = 32;
module_param(window, int, 0444);
MODULE_PARM_DESC(window, "can be set when it is loaded only");

static bool eager;
module_param(eager, bool, 0644);
MODULE_PARM_DESC(eager, "can be set at any time");

int hecaton_test_window(void);

int hecaton_test_window(void)
{
	return eager ? window : 0;
}
EXPORT_SYMBOL_GPL(hecaton_test_window);

static int __init hecaton_test_init(void)
{
	return 0;
}

static void __exit hecaton_test_exit(void)
{
}

module_init(hecaton_test_init);
module_exit(hecaton_test_exit);
MODULE_DESCRIPTION("Tests of hecaton.fleet.kmod");
MODULE_LICENSE("GPL");
