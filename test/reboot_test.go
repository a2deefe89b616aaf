// A reboot, for a daemon: the run directory is empty, and for its next process the machine
// has another boot id and was started just now. That process has namespaces of its own for
// it, and its tree is seen by nobody else but through inside.

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// rebooting, in the environment, makes this program the one that its arguments name, as
// after a reboot: it holds the path of a file with the boot id.
const rebooting = "BLKSNAP_TEST_REBOOT"

// reboot reboots the machine for the daemon, whose process has ended.
func (d *daemon) reboot() {
	d.t.Helper()
	if err := os.RemoveAll(d.runDir); err != nil {
		d.t.Fatal(err)
	}
	for unix.Unmount(d.mount, unix.MNT_DETACH) == nil {
	}
	d.bootID = filepath.Join(d.dir, "boot_id")
	write(d.t, d.bootID, []byte(uuid.NewString()+"\n"))
}

// init keeps what becomes another program on its first thread, the only one whose clock can
// be set.
func init() {
	if os.Getenv(rebooting) != "" {
		runtime.LockOSThread()
	}
}

// becomeRebooted becomes the program. It returns only where that fails.
func becomeRebooted(bootID string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWTIME); err != nil {
		return fmt.Errorf("unshare mounts and time: %w", err)
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return err
	}
	// The offset's nanoseconds are never negative.
	offset := fmt.Sprintf("boottime %d %d", -up.Sec-1, min(1e9-up.Nsec, 1e9-1))
	if err := os.WriteFile("/proc/self/timens_offsets", []byte(offset), 0); err != nil {
		return err
	}
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount(bootID, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("mount another boot id: %w", err)
	}
	os.Unsetenv(rebooting)
	return unix.Exec(os.Args[1], os.Args[1:], os.Environ())
}

// inside is a path as the daemon's process sees it.
func (d *daemon) inside(path string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", d.cmd.Process.Pid), path)
}

// TestReboot looks at what a daemon sees of a reboot.
func TestReboot(t *testing.T) {
	needRoot(t)
	d := newDaemon(t, nil)
	args := []string{makeOrigin(t, d.dir, "vda", miB), "--store", "mem:16MiB"}
	d.start(args...)
	mkdir(t, d.snapshot("s1"))
	eventually(t, "the change map is written down", func() bool { return exists(filepath.Join(d.state, "devices", "vda", "map")) })
	generation := read(t, d.device("vda", "cbt", "generation"))
	d.kill()
	d.reboot()
	d.start(args...)
	if exists(d.inside(d.snapshot("s1"))) {
		t.Error("a snapshot has outlived the reboot")
	}
	if got := read(t, d.inside(d.device("vda", "cbt", "generation"))); got != generation {
		t.Errorf("generation\n got %s\nwant %s", got, generation)
	}
}
