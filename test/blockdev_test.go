// A live export as a block device: nbdfuse makes a file of it, and loop a
// block device of the file. No kernel module is needed.

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// attach returns the path of a block device that reads and writes an export
// of the daemon until the test ends.
func attach(t *testing.T, d *daemon, export string) string {
	t.Helper()
	return loop(t, fuseFile(t, d.uri(export)), false)
}

// fuseFile returns the path of a file that reads and writes an export until the
// test ends.
func fuseFile(t *testing.T, uri string) string {
	t.Helper()
	need(t, "nbdfuse")
	point := scratch(t)
	stderr := &log{}
	cmd := exec.Command("nbdfuse", point, uri)
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endNbdfuse(t, cmd, point) })
	file := filepath.Join(point, "nbd")
	eventually(t, "nbdfuse shows its file", func() bool { return exists(file) })
	return file
}

// slowOrigin returns the path of a file of size zeroes whose writes take at
// least delay.
func slowOrigin(t *testing.T, size int64, delay time.Duration) string {
	t.Helper()
	need(t, "nbdkit")
	socket := filepath.Join(scratch(t), "slow.sock")
	said := &log{}
	cmd := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix", socket, "--filter=delay",
		"memory", fmt.Sprint(size), fmt.Sprintf("delay-write=%dms", delay.Milliseconds()))
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		overdue := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer overdue.Stop()
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("nbdkit: %v\n%s", err, said)
		}
	})
	eventually(t, "nbdkit listens", func() bool { return exists(socket) })
	return fuseFile(t, "nbd+unix:///?socket="+socket)
}

// endNbdfuse unmounts point and waits for the nbdfuse that served it.
func endNbdfuse(t *testing.T, cmd *exec.Cmd, point string) {
	if err := unix.Unmount(point, 0); err != nil {
		t.Errorf("unmount %s: %v", point, err)
		unix.Unmount(point, unix.MNT_DETACH)
	}
	overdue := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer overdue.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("nbdfuse: %v\n%s", err, cmd.Stderr)
	}
}

// loop returns the path of a loop device over file that lasts until the test
// ends. The kernel detaches it when its last user is gone, and one of them is
// this process: no loop device is left behind, however the tests end.
func loop(t *testing.T, file string, readOnly bool) string {
	t.Helper()
	dev, _ := loopUntil(t, file, readOnly)
	return dev
}

// loopUntil is loop with the end before that of the test.
func loopUntil(t *testing.T, file string, readOnly bool) (path string, detach func()) {
	t.Helper()
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_DIRECT_IO)
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	backing, err := os.OpenFile(file, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	dev, err := configureLoop(backing, mode, flags)
	if err != nil {
		t.Fatalf("make a loop device of %s: %v", file, err)
	}
	detach = sync.OnceFunc(func() {
		if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
			t.Errorf("detach %s: %v", dev.Name(), err)
		}
		dev.Close()
	})
	t.Cleanup(detach)
	return dev.Name(), detach
}

// configureLoop takes the first free loop device; another process may take it
// before us, and then the next one is tried.
func configureLoop(backing *os.File, mode int, flags uint32) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), mode, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{
			Fd:   uint32(backing.Fd()),
			Info: unix.LoopInfo64{Flags: flags},
		})
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
}

// mount mounts a block device until the test ends and returns where.
func mount(t *testing.T, dev, fsType, options string) (point string) {
	t.Helper()
	point = scratch(t)
	run(t, "mount", "-t", fsType, "-o", options, dev, point)
	t.Cleanup(func() {
		if err := unmount(point); err != nil {
			t.Errorf("unmount %s: %v", point, err)
		}
	})
	return point
}

// unmount succeeds also where nothing is mounted. What is busy is detached.
func unmount(point string) error {
	err := unix.Unmount(point, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		unix.Unmount(point, unix.MNT_DETACH)
	}
	return err
}
