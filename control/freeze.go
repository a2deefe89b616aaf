// Which file systems must not be frozen: a write to a frozen one waits, and the
// thawing may wait for the write.

package control

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// setDirs says where the tree is mounted, if it is, and where we keep state.
func (d *Daemon) setDirs(mount string, dirs ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mount, d.dirs = mount, dirs
}

// checkFreeze refuses mount points whose file system holds an origin, a part of
// the snapstore, or the state, directly or below loop devices and device mapper; and
// what is no mount point.
func (d *Daemon) checkFreeze(q FreezeRequest) (any, error) {
	used := make(map[uint64]string) // file systems, by device number
	for _, dev := range d.sortedDevices() {
		fileSystems(dev.Origin(), "the origin of device "+dev.Name(), used, maxGround)
	}
	for _, p := range d.pool.Parts() {
		if p.Spec.Path != "" {
			fileSystems(p.Spec.Path, "a part of the snapstore", used, maxGround)
		}
	}
	d.mu.Lock()
	dirs := d.dirs
	d.mu.Unlock()
	for _, dir := range dirs {
		fileSystems(dir, "the daemon's state", used, maxGround)
	}
	for _, m := range q.Mounts {
		if !filepath.IsAbs(m) {
			return nil, refuse(syscall.EINVAL, "mount point %q is not an absolute path", clip(m))
		}
		var st unix.Stat_t
		if err := unix.Stat(m, &st); err != nil {
			return nil, fmt.Errorf("freeze %s: %w", m, err)
		}
		if what := used[fileSystem(m, &st)]; what != "" {
			return nil, refuse(syscall.EBUSY, "freeze %s: its file system holds %s", m, what)
		}
		if !isMountPoint(m) {
			return nil, refuse(syscall.EINVAL, "freeze %s: no file system is mounted there", m)
		}
	}
	return nil, nil
}

// isMountPoint is false for a path within a file system. Where one is not mounted that was
// to be frozen, another would be.
func isMountPoint(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, 0, &st)
	known := st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 // since Linux 5.8
	return err == nil && (!known || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0)
}

// fileSystems notes the file system that path is on, and those below it, as used
// by what.
func fileSystems(path, what string, used map[uint64]string, depth int) {
	var st unix.Stat_t
	if depth == 0 || unix.Stat(path, &st) != nil {
		return
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		belowDevice(st.Rdev, what, used, depth-1)
		return
	}
	if dev := fileSystem(path, &st); used[dev] == "" {
		used[dev] = what
		belowDevice(dev, what, used, depth-1)
	}
}

// fileSystem is the number of the file system that path is on, that of its block
// device where it stands on one: btrfs gives each subvolume another.
func fileSystem(path string, st *unix.Stat_t) uint64 {
	if unix.Major(st.Dev) != 0 {
		return st.Dev
	}
	var source unix.Stat_t
	m, err := mountOf(path)
	if err == nil && filepath.IsAbs(m.source) && unix.Stat(m.source, &source) == nil && source.Mode&unix.S_IFMT == unix.S_IFBLK {
		return source.Rdev
	}
	return st.Dev
}

// belowDevice does the same for what a block device stands on.
func belowDevice(dev uint64, what string, used map[uint64]string, depth int) {
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil || depth == 0 {
		return // no block device
	}
	if _, err := os.Stat(dir + "/partition"); err == nil {
		dir = filepath.Dir(dir)
	}
	if file, err := os.ReadFile(dir + "/loop/backing_file"); err == nil {
		fileSystems(strings.TrimSuffix(string(file), "\n"), what, used, depth-1)
	}
	below, _ := filepath.Glob(dir + "/slaves/*/dev")
	for _, s := range below {
		if text, err := os.ReadFile(s); err == nil {
			belowDevice(parseDev(strings.TrimSpace(string(text))), what, used, depth-1)
		}
	}
}
