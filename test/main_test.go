// Builds blksnap once and runs the tests in a mount namespace of their own.

package test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var seed = flag.Int64("seed", time.Now().UnixNano(), "seed of the random tests")

// blksnapPath is the path of the blksnap under test. It is built with the race
// detector where the tests are.
var blksnapPath string

func TestMain(m *testing.M) {
	for name, run := range map[string]func(string) error{tracing: runTracer, hanging: runHanging, rebooting: becomeRebooted} {
		if order := os.Getenv(name); order != "" {
			if err := run(order); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	flag.Parse()
	if os.Getenv("GORACE") == "" { // or each process that it watches sleeps for a second before it ends
		os.Setenv("GORACE", "atexit_sleep_ms=10")
	}
	if err := enterNamespace(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(buildAndRun(m))
}

// enterNamespace moves the process into a mount namespace of its own, so that
// the kernel takes away whatever the tests mounted, however they end. It needs
// root; without it most tests are skipped and the others mount nothing that
// fusermount3 does not clear.
func enterNamespace() error {
	const entered = "BLKSNAP_TEST_NAMESPACE"
	if os.Geteuid() != 0 || os.Getenv(entered) != "" {
		return nil
	}

	// A namespace belongs to a thread: only the thread that calls execve
	// goes on, and takes its own into the new program.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace for the tests: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts of the tests private: %w", err)
	}
	if err := os.Setenv(entered, "1"); err != nil {
		return err
	}
	return fmt.Errorf("start the tests again: %w", syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// openFuse lets every user open /dev/fuse in the tests' namespace, as udev
// lets them everywhere; where udev does not run it is root's. dir is an empty
// directory.
func openFuse(dir string) error {
	st, err := os.Stat("/dev/fuse")
	if os.Geteuid() != 0 || err != nil || st.Mode().Perm()&0o006 == 0o006 {
		return nil
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k"); err != nil {
		return fmt.Errorf("mount a file system for /dev/fuse: %w", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	node := filepath.Join(dir, "fuse")
	if err := unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 229))); err != nil {
		return fmt.Errorf("make a node for /dev/fuse: %w", err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		return err
	}
	if err := unix.Mount(node, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show every user /dev/fuse: %w", err)
	}
	return nil
}

func buildAndRun(m *testing.M) int {
	// Debian's su leaves these out, and mkfs lives there.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")

	dir, err := os.MkdirTemp("", "blksnap-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := errors.Join(os.Chmod(dir, 0o755), openFuse(dir)); err != nil { // the tests run as nobody, too
		fmt.Fprintln(os.Stderr, err)
		return 1
	}

	blksnapPath = filepath.Join(dir, "blksnap")
	build := exec.Command("go", "build", "-o", blksnapPath, "blksnap")
	if builtWithRace() {
		build.Args = append(build.Args[:2], "-race", "-o", blksnapPath, "blksnap")
	}
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build blksnap: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

func builtWithRace() bool {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}
