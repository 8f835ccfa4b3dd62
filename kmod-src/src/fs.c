// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The file system: names, sizes and limits. What a file does is in file.c.
 *
 * Directories exist because libvirt makes one for each VM. Pages live in
 * shmem files on a tmpfs mount of our own, which nobody else can reach and
 * which never makes huge pages by itself: a huge page is mapped as a whole,
 * also where part of it has not arrived.
 */
#include <linux/fs_context.h>
#include <linux/fs_parser.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/seq_file.h>
#include <linux/shmem_fs.h>
#include <linux/statfs.h>

#include "remote_ram.h"

/**
 * struct rram_fs - one mount
 * @lock: @used and @files
 * @used: sizes of all files
 * @size: limit of that, in bytes; 0 for none
 * @file_size: limit of one file, in bytes; 0 for none
 * @files: number of files
 * @nr_files: limit of that; 0 for none
 * @mode: of the root
 * @uid: owner of the root
 * @gid: group of the root
 */
struct rram_fs {
	spinlock_t lock;	/* used, files and their limits */
	u64 used;
	u64 size;
	u64 file_size;
	u64 files;
	u64 nr_files;
	umode_t mode;
	kuid_t uid;
	kgid_t gid;
};

static struct vfsmount *rram_shmem_mnt;
static struct kmem_cache *rram_inode_cache;

static struct rram_fs *rram_fs_of(struct super_block *sb)
{
	return sb->s_fs_info;
}

struct file *rram_shmem_new(const char *name, loff_t size)
{
	return shmem_file_setup_with_mnt(rram_shmem_mnt, name, size,
					 RRAM_SHMEM_FLAGS);
}

static struct inode *rram_alloc_inode(struct super_block *sb)
{
	struct rram_file *f = alloc_inode_sb(sb, rram_inode_cache, GFP_KERNEL);

	if (!f)
		return NULL;
	f->shmem = NULL;
	return &f->inode;
}

static void rram_free_inode(struct inode *inode)
{
	kmem_cache_free(rram_inode_cache, rram_file_of(inode));
}

static void rram_evict_inode(struct inode *inode)
{
	struct rram_fs *fs = rram_fs_of(inode->i_sb);
	struct rram_file *f = rram_file_of(inode);

	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	if (!S_ISREG(inode->i_mode))
		return;
	/* No descriptor and no mapping is left: nobody can fault any more. */
	rram_file_destroy(f);
	spin_lock(&fs->lock);
	fs->used -= i_size_read(inode);
	fs->files--;
	spin_unlock(&fs->lock);
}

static struct inode *rram_new_inode(struct super_block *sb, struct inode *dir,
				    umode_t mode);

static int rram_mknod(struct mnt_idmap *idmap, struct inode *dir,
		      struct dentry *dentry, umode_t mode)
{
	struct inode *inode = rram_new_inode(dir->i_sb, dir, mode);

	if (IS_ERR(inode))
		return PTR_ERR(inode);
	rram_make_persistent(dentry, inode);
	inode_set_mtime_to_ts(dir, inode_set_ctime_current(dir));
	return 0;
}

static int rram_create(struct mnt_idmap *idmap, struct inode *dir,
		       struct dentry *dentry, umode_t mode RRAM_CREATE_EXCL)
{
	return rram_mknod(idmap, dir, dentry, mode | S_IFREG);
}

static RRAM_MKDIR_RETURN rram_mkdir(struct mnt_idmap *idmap, struct inode *dir,
				    struct dentry *dentry, umode_t mode)
{
	int err = rram_mknod(idmap, dir, dentry, mode | S_IFDIR);

	if (!err)
		inc_nlink(dir);
	return RRAM_MKDIR_RESULT(err);
}

static const struct inode_operations rram_dir_inode_operations = {
	.create = rram_create,
	.lookup = simple_lookup,
	.mkdir = rram_mkdir,
	.unlink = simple_unlink,
	.rmdir = simple_rmdir,
	.rename = simple_rename,
};

static struct inode *rram_new_inode(struct super_block *sb, struct inode *dir,
				    umode_t mode)
{
	struct rram_fs *fs = rram_fs_of(sb);
	struct inode *inode;
	int err;

	if (S_ISREG(mode)) {
		spin_lock(&fs->lock);
		if (fs->nr_files && fs->files >= fs->nr_files) {
			spin_unlock(&fs->lock);
			return ERR_PTR(-ENOSPC);
		}
		fs->files++;
		spin_unlock(&fs->lock);
	}
	inode = new_inode(sb);
	if (!inode) {
		err = -ENOMEM;
		goto uncount;
	}
	inode->i_ino = get_next_ino();
	inode_init_owner(&nop_mnt_idmap, inode, dir, mode);
	simple_inode_init_ts(inode);
	if (S_ISDIR(mode)) {
		inode->i_op = &rram_dir_inode_operations;
		inode->i_fop = &simple_dir_operations;
		inc_nlink(inode);
		return inode;
	}
	inode->i_op = &rram_file_inode_operations;
	inode->i_fop = &rram_file_operations;
	err = rram_file_init(rram_file_of(inode));
	if (!err)
		return inode;
	/* Not a regular file yet for rram_evict_inode(). */
	inode->i_mode = 0;
	iput(inode);
uncount:
	if (S_ISREG(mode)) {
		spin_lock(&fs->lock);
		fs->files--;
		spin_unlock(&fs->lock);
	}
	return ERR_PTR(err);
}

/* Takes a change of a file's size into account. */
static int rram_account(struct rram_fs *fs, u64 old, u64 size)
{
	int err = 0;

	spin_lock(&fs->lock);
	if (size > old && fs->file_size && size > fs->file_size)
		err = -EFBIG;
	else if (size > old && fs->size && fs->used - old + size > fs->size)
		err = -ENOSPC;
	else
		fs->used += size - old;
	spin_unlock(&fs->lock);
	return err;
}

static int rram_resize(struct inode *inode, loff_t size)
{
	struct rram_file *f = rram_file_of(inode);
	struct iattr attr = { .ia_valid = ATTR_SIZE, .ia_size = size };
	struct inode *inner = rram_inner(f);
	loff_t old = i_size_read(inode);
	int err;

	if (size == old)
		return 0;
	mutex_lock(&f->control);
	/*
	 * A session has counted the pages, and whoever still waits for one of
	 * an earlier session looks at the bitmaps: from the first session on
	 * the size is fixed.
	 */
	err = -EBUSY;
	if (f->dirty)
		goto unlock;
	err = rram_account(rram_fs_of(inode->i_sb), old, size);
	if (err)
		goto unlock;
	inode_lock(inner);
	err = notify_change(&nop_mnt_idmap, f->shmem->f_path.dentry, &attr,
			    NULL);
	inode_unlock(inner);
	if (err) {
		rram_account(rram_fs_of(inode->i_sb), size, old);
		goto unlock;
	}
	i_size_write(inode, size);
	f->npages = DIV_ROUND_UP(size, PAGE_SIZE);
unlock:
	mutex_unlock(&f->control);
	return err;
}

static int rram_setattr(struct mnt_idmap *idmap, struct dentry *dentry,
			struct iattr *attr)
{
	struct inode *inode = d_inode(dentry);
	int err = setattr_prepare(idmap, dentry, attr);

	if (err)
		return err;
	if (attr->ia_valid & ATTR_SIZE) {
		err = rram_resize(inode, attr->ia_size);
		if (err)
			return err;
		inode_set_mtime_to_ts(inode, inode_set_ctime_current(inode));
	}
	setattr_copy(idmap, inode, attr);
	return 0;
}

static int rram_getattr(struct mnt_idmap *idmap, const struct path *path,
			struct kstat *stat, u32 mask, unsigned int flags)
{
	struct inode *inode = d_inode(path->dentry);

	RRAM_FILLATTR(idmap, mask, inode, stat);
	stat->blocks = rram_inner(rram_file_of(inode))->i_mapping->nrpages <<
		       (PAGE_SHIFT - 9);
	return 0;
}

const struct inode_operations rram_file_inode_operations = {
	.setattr = rram_setattr,
	.getattr = rram_getattr,
};

static int rram_statfs(struct dentry *dentry, struct kstatfs *buf)
{
	struct rram_fs *fs = rram_fs_of(dentry->d_sb);

	buf->f_type = RRAM_FS_MAGIC;
	buf->f_bsize = PAGE_SIZE;
	buf->f_namelen = NAME_MAX;
	spin_lock(&fs->lock);
	if (fs->size) {
		buf->f_blocks = fs->size >> PAGE_SHIFT;
		buf->f_bfree = (fs->size - min(fs->size, fs->used)) >> PAGE_SHIFT;
		buf->f_bavail = buf->f_bfree;
	}
	if (fs->nr_files) {
		buf->f_files = fs->nr_files;
		buf->f_ffree = fs->nr_files - fs->files;
	}
	spin_unlock(&fs->lock);
	return 0;
}

static int rram_show_options(struct seq_file *m, struct dentry *root)
{
	struct rram_fs *fs = rram_fs_of(root->d_sb);

	if (fs->size)
		seq_printf(m, ",size=%llu", fs->size);
	if (fs->file_size)
		seq_printf(m, ",file_size=%llu", fs->file_size);
	if (fs->nr_files)
		seq_printf(m, ",nr_files=%llu", fs->nr_files);
	if (fs->mode != 0755)
		seq_printf(m, ",mode=%03o", fs->mode);
	if (!uid_eq(fs->uid, GLOBAL_ROOT_UID))
		seq_printf(m, ",uid=%u",
			   from_kuid_munged(&init_user_ns, fs->uid));
	if (!gid_eq(fs->gid, GLOBAL_ROOT_GID))
		seq_printf(m, ",gid=%u",
			   from_kgid_munged(&init_user_ns, fs->gid));
	return 0;
}

static const struct super_operations rram_super_operations = {
	.alloc_inode = rram_alloc_inode,
	.free_inode = rram_free_inode,
	.evict_inode = rram_evict_inode,
	.drop_inode = RRAM_DROP_INODE,
	.statfs = rram_statfs,
	.show_options = rram_show_options,
};

static int rram_fill_super(struct super_block *sb, struct fs_context *fc)
{
	struct rram_fs *fs = rram_fs_of(sb);	/* has been fc's */
	struct inode *root;

	sb->s_maxbytes = MAX_LFS_FILESIZE;
	sb->s_blocksize = PAGE_SIZE;
	sb->s_blocksize_bits = PAGE_SHIFT;
	sb->s_magic = RRAM_FS_MAGIC;
	sb->s_op = &rram_super_operations;
	sb->s_time_gran = 1;
	root = rram_new_inode(sb, NULL, S_IFDIR | fs->mode);
	if (IS_ERR(root))
		return PTR_ERR(root);
	root->i_uid = fs->uid;
	root->i_gid = fs->gid;
	sb->s_root = d_make_root(root);
	return sb->s_root ? 0 : -ENOMEM;
}

enum rram_option {
	RRAM_OPT_SIZE,
	RRAM_OPT_FILE_SIZE,
	RRAM_OPT_NR_FILES,
	RRAM_OPT_MODE,
	RRAM_OPT_UID,
	RRAM_OPT_GID,
};

static const struct fs_parameter_spec rram_options[] = {
	fsparam_string("size", RRAM_OPT_SIZE),
	fsparam_string("file_size", RRAM_OPT_FILE_SIZE),
	fsparam_string("nr_files", RRAM_OPT_NR_FILES),
	fsparam_u32oct("mode", RRAM_OPT_MODE),
	fsparam_u32("uid", RRAM_OPT_UID),
	fsparam_u32("gid", RRAM_OPT_GID),
	{}
};

/* A number with a suffix; for a size also a share of all memory: "80%". */
static int rram_parse_size(struct fs_context *fc, struct fs_parameter *param,
			   bool share, u64 *value)
{
	char *end;

	*value = memparse(param->string, &end);
	if (share && *end == '%') {
		*value = mult_frac((u64)totalram_pages() << PAGE_SHIFT, *value,
				   100);
		end++;
	}
	if (*end || end == param->string)
		return invalfc(fc, "bad value for '%s'", param->key);
	return 0;
}

static int rram_parse_param(struct fs_context *fc, struct fs_parameter *param)
{
	struct rram_fs *fs = fc->s_fs_info;
	struct fs_parse_result result;
	int opt = fs_parse(fc, rram_options, param, &result);

	if (opt < 0)
		return opt;
	switch (opt) {
	case RRAM_OPT_SIZE:
		return rram_parse_size(fc, param, true, &fs->size);
	case RRAM_OPT_FILE_SIZE:
		return rram_parse_size(fc, param, true, &fs->file_size);
	case RRAM_OPT_NR_FILES:
		return rram_parse_size(fc, param, false, &fs->nr_files);
	case RRAM_OPT_MODE:
		fs->mode = result.uint_32 & 07777;
		return 0;
	case RRAM_OPT_UID:
		fs->uid = make_kuid(fc->user_ns, result.uint_32);
		return uid_valid(fs->uid) ? 0 : invalfc(fc, "bad uid");
	case RRAM_OPT_GID:
		fs->gid = make_kgid(fc->user_ns, result.uint_32);
		return gid_valid(fs->gid) ? 0 : invalfc(fc, "bad gid");
	}
	return -EINVAL;
}

static int rram_get_tree(struct fs_context *fc)
{
	return get_tree_nodev(fc, rram_fill_super);
}

static void rram_free_fc(struct fs_context *fc)
{
	kfree(fc->s_fs_info);
}

/* Changes the limits of a mount: not below what is in use. */
static int rram_reconfigure(struct fs_context *fc)
{
	struct rram_fs *fs = rram_fs_of(fc->root->d_sb);
	struct rram_fs *wanted = fc->s_fs_info;
	bool fits;

	spin_lock(&fs->lock);
	fits = !wanted->size || wanted->size >= fs->used;
	if (fits) {
		fs->size = wanted->size;
		fs->file_size = wanted->file_size;
		fs->nr_files = wanted->nr_files;
	}
	spin_unlock(&fs->lock);
	/* To say why not takes memory, which may mean to sleep. */
	return fits ? 0 : invalfc(fc, "size is below what is in use");
}

static const struct fs_context_operations rram_context_operations = {
	.parse_param = rram_parse_param,
	.get_tree = rram_get_tree,
	.reconfigure = rram_reconfigure,
	.free = rram_free_fc,
};

static int rram_init_fs_context(struct fs_context *fc)
{
	struct rram_fs *fs = kzalloc(sizeof(*fs), GFP_KERNEL);

	if (!fs)
		return -ENOMEM;
	if (fc->purpose == FS_CONTEXT_FOR_RECONFIGURE) {
		struct rram_fs *now = rram_fs_of(fc->root->d_sb);

		fs->size = now->size;
		fs->file_size = now->file_size;
		fs->nr_files = now->nr_files;
	}
	spin_lock_init(&fs->lock);
	fs->mode = 0755;
	fs->uid = GLOBAL_ROOT_UID;
	fs->gid = GLOBAL_ROOT_GID;
	fc->s_fs_info = fs;
	fc->ops = &rram_context_operations;
	return 0;
}

static void rram_kill_sb(struct super_block *sb)
{
	struct rram_fs *fs = rram_fs_of(sb);

	RRAM_KILL_SB(sb);
	kfree(fs);
}

static struct file_system_type rram_fs_type = {
	.owner = THIS_MODULE,
	.name = "remote_ram",
	.init_fs_context = rram_init_fs_context,
	.parameters = rram_options,
	.kill_sb = rram_kill_sb,
};
MODULE_ALIAS_FS("remote_ram");

static void rram_inode_once(void *p)
{
	struct rram_file *f = p;

	inode_init_once(&f->inode);
}

int rram_fs_init(void)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	char options[] = "size=0,nr_inodes=0,huge=never";
#else
	char options[] = "size=0,nr_inodes=0";
#endif
	struct file_system_type *tmpfs = get_fs_type("tmpfs");
	int err;

	if (!tmpfs)
		return -ENODEV;
	rram_shmem_mnt = vfs_kern_mount(tmpfs, SB_KERNMOUNT, "remote_ram",
					options);
	if (IS_ERR(rram_shmem_mnt))
		return PTR_ERR(rram_shmem_mnt);
	err = -ENOMEM;
	rram_inode_cache = kmem_cache_create("remote_ram_inode",
					     sizeof(struct rram_file), 0,
					     SLAB_RECLAIM_ACCOUNT |
					     SLAB_ACCOUNT, rram_inode_once);
	if (!rram_inode_cache)
		goto unmount;
	err = register_filesystem(&rram_fs_type);
	if (!err)
		return 0;
	kmem_cache_destroy(rram_inode_cache);
unmount:
	kern_unmount(rram_shmem_mnt);
	return err;
}

void rram_fs_exit(void)
{
	unregister_filesystem(&rram_fs_type);
	/* Inodes are freed after a grace period. */
	rcu_barrier();
	kmem_cache_destroy(rram_inode_cache);
	kern_unmount(rram_shmem_mnt);
}
