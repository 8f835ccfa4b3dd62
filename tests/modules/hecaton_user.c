// SPDX-License-Identifier: GPL-2.0-or-later
/* Uses hecaton_test for as long as it is loaded. */
#include <linux/init.h>
#include <linux/module.h>

int hecaton_test_window(void);

static int __init hecaton_user_init(void)
{
	pr_info("window %d\n", hecaton_test_window());
	return 0;
}

static void __exit hecaton_user_exit(void)
{
}

module_init(hecaton_user_init);
module_exit(hecaton_user_exit);
MODULE_DESCRIPTION("Tests of hecaton.fleet.kmod");
MODULE_LICENSE("GPL");
