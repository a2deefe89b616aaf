// What a path stands on. A snapstore, the state or a log on a file system that
// is itself on one of our exports would wait for itself: a write to the export
// needs the store, which needs a write to the export.
//
// Such a path shows while nothing is served, because what stands on our own
// exports cannot be read then, whether through NBD devices of the kernel, FUSE,
// loop devices or device mapper. So the layers below the path are followed down
// to what a process serves, and that has to answer one read: at the start before we
// serve, later while the exports hold their reads back for a moment.

package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// groundWait is how long what is served by somebody else has to answer.
	groundWait = 3 * time.Second

	// holdLimit is the same for as long as our clients wait for it.
	holdLimit = time.Second

	// answerWait is how long a disk has to answer before it counts as one that hangs: one that
	// was spun down takes some seconds, and to go on without it costs snapshots.
	answerWait = 10 * time.Second
)

// maxGround is how many layers are followed: more than anybody stacks, and an
// end if a file system is mounted from a file of its own.
const maxGround = 32

// probe looks whether what a process serves at path answers while we do not.
type probe func(ctx context.Context, path string) error

// checkGround refuses a path whose file system, or the block device that it is,
// does not pass the probe. What need not exist yet stands where its nearest existing
// parent does. what names the path's use in the error.
func checkGround(ctx context.Context, what, path string, p probe) error {
	ctx, cancel := context.WithTimeout(ctx, groundWait)
	defer cancel()
	var err error
	hangs := prompt(what, path, func() error {
		err = p.ground(ctx, path, maxGround)
		return nil
	})
	if hangs != nil {
		return hangs
	}
	if err == nil || errors.Is(err, fs.ErrPermission) { // whoever opens it will say that
		return nil
	}
	return fmt.Errorf("%s %s: %w", what, path, err)
}

// prompt calls f, which looks at what is at path, and gives up where its disk does not even
// answer that.
func prompt(what, path string, f func() error) error {
	return within(answerWait, what+" "+path, f)
}

// promptly calls f and returns what it returns, or errHangs after limit: then late is called
// with what f returns after that, unless with an error.
func promptly[T any](limit time.Duration, what string, f func() (T, error), late func(T)) (v T, err error) {
	type answer struct {
		v   T
		err error
	}
	answers, over := make(chan answer), make(chan struct{})
	go func() {
		v, err := f()
		select {
		case answers <- answer{v, err}:
		case <-over:
			if err == nil {
				late(v)
			}
		}
	}()
	select {
	case a := <-answers:
		return a.v, a.err
	case <-time.After(limit):
		close(over)
		return v, fmt.Errorf("%s: %w", what, errHangs)
	}
}

// ground follows at most depth layers below path.
func (p probe) ground(ctx context.Context, path string, depth int) error {
	path, st, err := nearest(path)
	if err != nil || depth == 0 {
		return err
	}
	if st.Mode().Type() == fs.ModeDevice { // a block device, not a character device
		return p.device(ctx, st.Sys().(*syscall.Stat_t).Rdev, depth)
	}
	m, err := mountOf(path)
	if err != nil {
		return err
	}
	switch source, err := os.Stat(m.source); {
	case m.dev != 0 && unix.Major(m.dev) != 0:
		return p.device(ctx, m.dev, depth)
	case err == nil && source.Mode().Type() == fs.ModeDevice: // btrfs
		return p.device(ctx, source.Sys().(*syscall.Stat_t).Rdev, depth)
	case strings.HasPrefix(m.kind, "fuse") && st.Mode().IsRegular():
		return p(ctx, path)
	}
	return nil
}

// nearest is path, or its nearest parent that exists.
func nearest(path string) (string, fs.FileInfo, error) {
	for {
		st, err := os.Stat(path)
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return path, st, err
		}
		path = filepath.Dir(path)
	}
}

// device follows the block device dev down: partitions, loop devices and what device
// mapper or md put together.
func (p probe) device(ctx context.Context, dev uint64, depth int) error {
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return fmt.Errorf("find what it stands on: %w", err)
	}
	if _, err := os.Stat(dir + "/partition"); err == nil {
		dir = filepath.Dir(dir)
	}
	if name := filepath.Base(dir); strings.HasPrefix(name, "nbd") {
		return p(ctx, "/dev/"+name)
	}
	if file, err := os.ReadFile(dir + "/loop/backing_file"); err == nil {
		return p.ground(ctx, strings.TrimSuffix(string(file), "\n"), depth-1)
	}
	below, err := filepath.Glob(dir + "/slaves/*/dev")
	if err != nil || depth == 0 {
		return err
	}
	for _, s := range below {
		if text, err := os.ReadFile(s); err == nil {
			if err := p.device(ctx, parseDev(strings.TrimSpace(string(text))), depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// probeRead reads one block of the file or device at path, past the page cache,
// which may still know what nobody serves any more. A read that hangs cannot be
// called back, and no process ends before its reads: so it is another one's, dd.
func probeRead(ctx context.Context, path string) error {
	dd := exec.Command("dd", "if="+path, "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none")
	if err := dd.Start(); err != nil {
		return fmt.Errorf("probe %s: %w", path, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- dd.Wait() }() // with the read, or our process
	select {
	case err := <-ended:
		if err == nil {
			return nil
		}
	case <-ctx.Done():
	}
	return refuse(syscall.EDEADLK, "it stands on %s, which does not answer while we do not: is that one of our own exports?", path)
}

// probeHeld is probeRead while we serve. An image in the tree is served by nobody else.
func (d *Daemon) probeHeld(ctx context.Context, path string) error {
	d.mu.Lock()
	tree := d.mount
	d.mu.Unlock()
	if tree != "" && sameFileSystem(tree, path) {
		return refuse(syscall.EDEADLK, "it stands on %s, which is an image of ours", path)
	}
	defer d.reads.hold()()
	ctx, cancel := context.WithTimeout(ctx, holdLimit)
	defer cancel()
	return probeRead(ctx, path)
}

func sameFileSystem(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev
}

// mount is a line of /proc/self/mountinfo.
type mount struct {
	dev    uint64
	kind   string // type of the file system
	source string
}

// mountOf is the mount that path, which exists, is on.
func mountOf(path string) (mount, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return mount{}, fmt.Errorf("find mount of %s: %w", path, err)
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return mount{}, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE ...
		before, after, _ := strings.Cut(lines.Text(), " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if len(head) > 2 && len(tail) > 1 && head[0] == strconv.FormatUint(st.Mnt_id, 10) {
			return mount{parseDev(head[2]), tail[0], tail[1]}, nil
		}
	}
	return mount{}, lines.Err()
}

// parseDev reads MAJOR:MINOR; 0 if it is none.
func parseDev(s string) uint64 {
	var major, minor uint32
	if _, err := fmt.Sscanf(s, "%d:%d", &major, &minor); err != nil {
		return 0
	}
	return unix.Mkdev(major, minor)
}
