/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Kernels differ here and nowhere else. Included before every source file.
 * RRAM_HAVE_* come from Kbuild, which looks into the kernel's headers.
 */
#ifndef _RRAM_COMPAT_H
#define _RRAM_COMPAT_H

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "remote_ram needs Linux 6.1 or later"
#endif

#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/scatterlist.h>
#include <linux/shmem_fs.h>
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
#include <crypto/algapi.h>
#else
#include <crypto/utils.h>
#endif

/* -- VFS ------------------------------------------------------------------ */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
#define mnt_idmap	user_namespace
#define nop_mnt_idmap	init_user_ns
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
#define RRAM_FILLATTR(idmap, mask, inode, stat) \
	generic_fillattr(idmap, inode, stat)
#else
#define RRAM_FILLATTR(idmap, mask, inode, stat) \
	generic_fillattr(idmap, mask, inode, stat)
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
static inline struct timespec64 inode_set_mtime_to_ts(struct inode *inode,
						      struct timespec64 ts)
{
	inode->i_mtime = ts;
	return ts;
}

static inline void simple_inode_init_ts(struct inode *inode)
{
	inode->i_ctime = current_time(inode);
	inode->i_mtime = inode->i_ctime;
	inode->i_atime = inode->i_ctime;
}
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 10, 0)
/* Not for modules; a large folio counts as not mapped, which is on the safe side. */
static inline int rram_folio_mapcount(struct folio *folio)
{
	return folio_test_large(folio) ? 0 : atomic_read(&folio->_mapcount) + 1;
}
#else
#define rram_folio_mapcount(folio)	folio_mapcount(folio)
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
#define RRAM_MKDIR_RETURN	int
#define RRAM_MKDIR_RESULT(err)	(err)
#else
#define RRAM_MKDIR_RETURN	struct dentry *
#define RRAM_MKDIR_RESULT(err)	ERR_PTR(err)
#endif

#ifdef RRAM_HAVE_CREATE_EXCL
#define RRAM_CREATE_EXCL	, bool excl
#else
#define RRAM_CREATE_EXCL
#endif

#ifdef RRAM_HAVE_INODE_JUST_DROP
#define RRAM_DROP_INODE		inode_just_drop
#else
#define RRAM_DROP_INODE		generic_delete_inode
#endif

/* A name that stays in the dentry cache: there is nothing to look it up from. */
static inline void rram_make_persistent(struct dentry *dentry,
					struct inode *inode)
{
#ifdef RRAM_HAVE_PERSISTENT_DENTRY
	d_make_persistent(dentry, inode);
#else
	d_instantiate(dentry, inode);
	dget(dentry);
#endif
}

#ifdef RRAM_HAVE_PERSISTENT_DENTRY
#define RRAM_KILL_SB		kill_anon_super
#else
#define RRAM_KILL_SB		kill_litter_super
#endif

/* -- Memory --------------------------------------------------------------- */

#ifdef RRAM_HAVE_UFFD_OPS
/* userfaultfd would fill pages behind our back. */
#define RRAM_CLEAR_UFFD_OPS(ops)	((ops).uffd_ops = NULL)
#else
#define RRAM_CLEAR_UFFD_OPS(ops)	do { } while (0)
#endif

#ifdef RRAM_HAVE_VMA_FLAGS
#define RRAM_SHMEM_FLAGS	mk_vma_flags(VMA_NORESERVE_BIT)
#else
#define RRAM_SHMEM_FLAGS	VM_NORESERVE
#endif

static inline void rram_vm_flags_set(struct vm_area_struct *vma,
				     unsigned long flags)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	vma->vm_flags |= flags;
#else
	vm_flags_set(vma, flags);
#endif
}

static inline void rram_vm_flags_clear(struct vm_area_struct *vma,
				       unsigned long flags)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	vma->vm_flags &= ~flags;
#else
	vm_flags_clear(vma, flags);
#endif
}

/* shmem's own mmap, on a file of shmem's. */
static inline int rram_mmap_inner(struct file *inner,
				  struct vm_area_struct *vma)
{
#ifdef RRAM_HAVE_VFS_MMAP
	return vfs_mmap(inner, vma);
#else
	return inner->f_op->mmap(inner, vma);
#endif
}

#ifndef RRAM_HAVE_RELEASE_FAULT_LOCK
static inline void release_fault_lock(struct vm_fault *vmf)
{
#ifdef CONFIG_PER_VMA_LOCK
	if (vmf->flags & FAULT_FLAG_VMA_LOCK) {
		vma_end_read(vmf->vma);
		return;
	}
#endif
	mmap_read_unlock(vmf->vma->vm_mm);
}
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 5, 0)
static inline void sg_set_folio(struct scatterlist *sg, struct folio *folio,
				size_t len, size_t offset)
{
	sg_set_page(sg, &folio->page, len, offset);
}
#endif

/* A folio that is in memory now, with a reference; NULL if there is none. */
static inline struct folio *rram_find_folio(struct address_space *mapping,
					    pgoff_t index)
{
	struct folio *folio = filemap_get_folio(mapping, index);

	return IS_ERR(folio) ? NULL : folio;
}

/* A page of a shmem file, locked; NULL for a hole unless it is to be made. */
static inline int rram_shmem_get_folio(struct inode *inode, pgoff_t index,
				       struct folio **folio, bool make)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
	/*
	 * shmem_get_folio() is not exported. What this makes is up to date and
	 * zero from the start: the missing bit alone keeps it from being used.
	 */
	struct address_space *mapping = inode->i_mapping;
	struct page *page;

	for (;;) {
		*folio = NULL;
		if (!make && !xa_load(&mapping->i_pages, index))
			return 0;
		page = shmem_read_mapping_page_gfp(mapping, index,
						   mapping_gfp_mask(mapping));
		if (IS_ERR(page))
			return PTR_ERR(page);
		*folio = page_folio(page);
		folio_lock(*folio);
		if ((*folio)->mapping == mapping)
			return 0;
		folio_unlock(*folio);
		folio_put(*folio);
	}
#elif defined(RRAM_HAVE_SHMEM_WRITE_END)
	return shmem_get_folio(inode, index, 0, folio,
			       make ? SGP_WRITE : SGP_READ);
#else
	return shmem_get_folio(inode, index, folio,
			       make ? SGP_WRITE : SGP_READ);
#endif
}

static inline void rram_write_protect(struct address_space *mapping,
				      pgoff_t first, pgoff_t nr)
{
#ifdef CONFIG_MAPPING_DIRTY_HELPERS
	unsigned long seen[BITS_TO_LONGS(256)] = {};
	pgoff_t start = 0, end = 0;

	/* No more than a chunk. What is clean needs no second look later on. */
	wp_shared_mapping_range(mapping, first, nr);
	clean_record_shared_mapping_range(mapping, first, nr, first, seen,
					  &start, &end);
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
