// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Which pages were written, and what is behind an index.
 *
 * The one rule: a page table entry that allows writing belongs to a page whose
 * bit in rram_file.dirty is set. It is made true for all pages when tracking
 * begins (all bits are set), kept by rram_page_mkwrite(), and restored by
 * rram_harvest() for the bits that it clears.
 */
#include <linux/hugetlb.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/shmem_fs.h>

#include "remote_ram.h"
#include "trace.h"

void rram_track_write(struct rram_file *f, unsigned long first,
		      unsigned long nr)
{
	unsigned long i;

	for (i = first; i < first + nr && i < f->npages; i++)
		set_bit(i, f->dirty);
	if (unlikely(READ_ONCE(f->frozen)))
		atomic64_add(nr, &f->late_writes);
}

/* Takes write access away from every mapping of some pages. */
void rram_protect(struct rram_file *f, unsigned long first, unsigned long nr)
{
	/*
	 * An entry for a whole huge page can't be protected in part. Losing
	 * an entry is as good: the next write faults.
	 */
	if (READ_ONCE(f->large))
		unmap_mapping_pages(f->shmem->f_mapping, first, nr, false);
	else
		rram_write_protect(f->shmem->f_mapping, first, nr);
}

/*
 * Looks up a page without making one. Returns the folio with a reference and
 * its lock; NULL for a hole, or with *err.
 */
struct folio *rram_peek(struct rram_file *f, unsigned long index, int *err)
{
	struct folio *folio = NULL;

	*err = rram_shmem_get_folio(rram_inner(f), index, &folio, false);
	return *err ? NULL : folio;
}

/*
 * Looks up or makes a page that is about to be overwritten. Returns the folio
 * with a reference and its lock; it may be without contents and not up to
 * date. Huge pages come into an empty file with shmem_enabled=force alone, which
 * is for tests of the kernel and overrules the mount: -EOPNOTSUPP.
 */
struct folio *rram_grab(struct rram_file *f, unsigned long index)
{
	struct folio *folio = NULL;
	int err = rram_shmem_get_folio(rram_inner(f), index, &folio, true);

	/* What can't be read from swap, or is poisoned, is not wanted either. */
	if (!err && PageHWPoison(folio_file_page(folio, index))) {
		folio_unlock(folio);
		folio_put(folio);
		err = -EIO;
	}
	if (err == -EIO) {
		shmem_truncate_range(rram_inner(f), (loff_t)index << PAGE_SHIFT,
				     ((loff_t)(index + 1) << PAGE_SHIFT) - 1);
		err = rram_shmem_get_folio(rram_inner(f), index, &folio, true);
	}
	if (err)
		return ERR_PTR(err);
	if (folio_test_large(folio)) {
		/* What a fault asks for is one page. */
		folio_unlock(folio);
		folio_put(folio);
		return ERR_PTR(-EOPNOTSUPP);
	}
	return folio;
}

/*
 * Whether somebody has a locked folio in their hands besides the page cache,
 * mappings, a key, the LRU (a batch of it or a reclaimer, who take the flag
 * away) and us. Without a pin (FOLL_GET), it may be written through the
 * kernel's own address, with neither a fault nor a bit: O_DIRECT reads of NFS,
 * vhost-scsi, nested virtualization. The order errs on the safe side: nobody
 * maps it meanwhile, and what else goes away was counted before.
 */
static bool rram_is_borrowed(struct rram_session *s, struct folio *folio)
{
	long i, nr = folio_nr_pages(folio);
	bool lru = folio_test_lru(folio);
	long refs = folio_ref_count(folio);
	long known = 1 + nr;

	smp_rmb();	/* the count before what explains it */
	known += rram_folio_mapcount(folio) + !(lru || folio_test_lru(folio));
	for (i = 0; i < nr; i++)
		known += rram_key_holds(s, folio->index + i,
					folio_page(folio, i));
	return refs > known;
}

/**
 * rram_harvest - take dirty bits of one chunk
 * @s: the session of a source
 * @first: first page of the chunk
 * @want: which bits are of interest (RRAM_CHUNK_PAGES of them), NULL for all
 * @taken: out, the bits that were set and are now clear
 *
 * After this, what is read from the pages in @taken is at least as new as
 * every write that did not set its bit again.
 *
 * Return: number of bits in @taken.
 */
unsigned int rram_harvest(struct rram_session *s, unsigned long first,
			  const unsigned long *want, unsigned long *taken)
{
	struct rram_file *f = s->f;
	unsigned int nr = min_t(unsigned long, RRAM_CHUNK_PAGES,
				f->npages - first);
	unsigned int i, low, high, count = 0;
	struct folio *folio;
	unsigned long bits;

	/* A chunk is a multiple of the bits in a long. */
	for (i = 0; i < BITS_TO_LONGS(nr); i++) {
		atomic_long_t *word;

		word = (atomic_long_t *)&f->dirty[first / BITS_PER_LONG + i];
		bits = want ? want[i] : ~0UL;
		bits &= atomic_long_read(word);
		if (bits)
			bits &= atomic_long_fetch_andnot(bits, word);
		taken[i] = bits;
		count += hweight_long(bits);
	}
	for (; i < BITS_TO_LONGS(RRAM_CHUNK_PAGES); i++)
		taken[i] = 0;
	if (!count)
		return 0;
	low = find_first_bit(taken, nr);
	high = find_last_bit(taken, nr);
	/* Most entries at once, which flushes once. */
	rram_protect(f, first + low, high - low + 1);
	/*
	 * Whoever set a bit before it was taken may be about to make the page
	 * writable; it holds the folio's lock until it has. And an entry that
	 * still says dirty may become writable without a fault, by mprotect()
	 * and by NUMA balancing: under the lock none is left that is writable
	 * or dirty.
	 */
	for_each_set_bit(i, taken, nr) {
		folio = rram_find_folio(f->shmem->f_mapping, first + i);
		if (!folio)
			continue;
		folio_lock(folio);
		if (folio->mapping == f->shmem->f_mapping) {
			if (folio_mkclean(folio))
				folio_mark_dirty(folio);
			/* Not clean, but worth copying now. */
			if (folio_maybe_dma_pinned(folio) ||
			    rram_is_borrowed(s, folio))
				set_bit(first + i, f->dirty);
		}
		folio_unlock(folio);
		folio_put(folio);
	}
	trace_rram_harvest(f, first, count);
	return count;
}
