package fusefs

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// TestMayServe asks who has the connection of a tree open.
func TestMayServe(t *testing.T) {
	needRoot(t, "only root can mount what it wants")
	need(t, "/dev/fuse")
	dir, f := mountFile(t, fsType)
	m, ok, err := mountAt(dir)
	if err != nil || !ok {
		t.Fatalf("what is mounted on %s: %v, %v", dir, ok, err)
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	_, told := connection(info)
	holder := sleeps(t, f)
	ask := func(name string, pid int, want bool) {
		t.Helper()
		if got := mayServe(pid, m.dev); got != want {
			t.Errorf("%s may serve it: %v, want %v", name, got, want)
		}
	}
	ask("who has it", os.Getpid(), true)
	ask("who has it too", holder, true)
	ask("another process", sleeps(t), false)
	ask("a process that has ended", 1<<30, false)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, other := mountFile(t, fsType)
	defer other.Close()
	ask("who has another one", os.Getpid(), !told)
	ask("the last who has it", holder, true)
}

// sleeps starts a process that has files open, and returns its id.
func sleeps(t *testing.T, files ...*os.File) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "3600")
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd.Process.Pid
}
