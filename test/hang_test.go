// A daemon that was killed and cannot end.

package test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// hanging, in the environment, makes this program one that hangs in its own tree.
const hanging = "BLKSNAP_TEST_HANG"

// runHanging plays a daemon with a run directory and a mount point, as order says, of
// which a thread waits for ever for an answer of its own tree.
func runHanging(order string) error {
	var run, mount string
	if _, err := fmt.Sscanf(order, "%s %s", &run, &mount); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/self/comm", []byte("blksnap"), 0); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(run, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(lock, "%d %s\n", os.Getpid(), filepath.Join(run, "control.sock")); err != nil {
		return err
	}
	_, err = fs.Mount(mount, &hangingTree{}, &fs.Options{MountOptions: fuse.MountOptions{
		FsName: "blksnap", Name: "blksnap", DirectMountStrict: true,
	}})
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(mount, "x"))
	return fmt.Errorf("a tree that hangs has answered: %v", err)
}

// hangingTree does not answer who looks for something in it.
type hangingTree struct{ fs.Inode }

func (*hangingTree) Lookup(context.Context, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	fmt.Println("hangs")
	select {}
}

// TestKilledInItsOwnTree starts a daemon over one that was killed while a thread of it
// waited for its own tree, which cannot be interrupted: that one keeps its locks until the
// next cuts its tree off.
func TestKilledInItsOwnTree(t *testing.T) {
	needRoot(t)
	d := newDaemon(t, nil)
	origin := makeOrigin(t, d.dir, "vda", miB)
	if err := os.Mkdir(d.runDir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), hanging+"="+d.runDir+" "+d.mount)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil { // nobody has cut it off
			unix.Unmount(d.mount, unix.MNT_FORCE)
			cmd.Wait()
		}
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "hangs\n" {
		t.Fatalf("it said %q, %v", line, err)
	}
	cmd.Process.Kill()
	d.start(origin)
	cmd.Wait()
	if got := read(t, d.mount, "version"); !strings.HasPrefix(got, "blksnap ") {
		t.Errorf("version in the tree: %q", got)
	}
	eventually(t, "the daemon says that it cut a tree off", func() bool { return strings.Contains(d.stderr.String(), "was cut off") })
}
