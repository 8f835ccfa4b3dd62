/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Kernels differ here and nowhere else. Included before every source file.
 */
#ifndef _RRAM_COMPAT_H
#define _RRAM_COMPAT_H

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "remote_ram needs Linux 6.1 or later"
#endif

#include <linux/fs.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>

/* -- VFS ------------------------------------------------------------------ */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
#define RRAM_MKDIR_RETURN	int
#define RRAM_MKDIR_RESULT(err)	(err)
#else
#define RRAM_MKDIR_RETURN	struct dentry *
#define RRAM_MKDIR_RESULT(err)	ERR_PTR(err)
#endif

#define RRAM_DROP_INODE		generic_delete_inode
#define RRAM_KILL_SB		kill_litter_super
#define RRAM_FILLATTR(idmap, mask, inode, stat) \
	generic_fillattr(idmap, mask, inode, stat)

/* -- Memory --------------------------------------------------------------- */

#define RRAM_CLEAR_UFFD_OPS(ops)	do { } while (0)

static inline void rram_vm_flags_set(struct vm_area_struct *vma,
				     unsigned long flags)
{
	vm_flags_set(vma, flags);
}

static inline int rram_mmap_inner(struct file *inner,
				  struct vm_area_struct *vma,
				  const struct file_operations *fops)
{
	return fops->mmap(inner, vma);
}

/* A page of a shmem file, locked; NULL for a hole unless it is to be made. */
static inline int rram_shmem_get_folio(struct inode *inode, pgoff_t index,
				       struct folio **folio, bool make)
{
	return shmem_get_folio(inode, index, 0, folio,
			       make ? SGP_WRITE : SGP_READ);
}

/* A folio that is in memory now, with a reference; NULL if there is none. */
static inline struct folio *rram_find_folio(struct address_space *mapping,
					    pgoff_t index)
{
	struct folio *folio = filemap_get_folio(mapping, index);

	return IS_ERR(folio) ? NULL : folio;
}

static inline void rram_write_protect(struct address_space *mapping,
				      pgoff_t first, pgoff_t nr)
{
#ifdef CONFIG_MAPPING_DIRTY_HELPERS
	wp_shared_mapping_range(mapping, first, nr);
#else
	/* Losing an entry is as good: the next write faults. */
	unmap_mapping_pages(mapping, first, nr, false);
#endif
}

#ifdef CONFIG_MEMCG
static inline struct mem_cgroup *rram_memcg_of_current(void)
{
	return get_mem_cgroup_from_mm(current->mm);
}

static inline void rram_memcg_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}
#else
static inline struct mem_cgroup *rram_memcg_of_current(void)
{
	return NULL;
}

static inline void rram_memcg_put(struct mem_cgroup *memcg)
{
}
#endif

#endif /* _RRAM_COMPAT_H */
