package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLockHolder(t *testing.T) {
	const locks = `1: OFDLCK ADVISORY  READ -1 fe:00:77 100 100
2: FLOCK  ADVISORY  WRITE 6551 fe:00:9979010 0 EOF
2: -> FLOCK  ADVISORY  WRITE 6911 fe:00:9979010 0 EOF
3: POSIX  ADVISORY  WRITE 12 fe:00:78 0 EOF
4: FLOCK  ADVISORY  WRITE 0 00:2a:5 0 EOF
5: FLOCK  ADVISORY
`
	for _, tc := range []struct {
		name string
		ino  uint64
		dev  uint64
		want int
		ok   bool
	}{
		{"locked", 9979010, unix.Mkdev(0xfe, 0), 6551, true},
		{"locked by byte ranges alone", 77, unix.Mkdev(0xfe, 0), 0, false},
		{"the same number elsewhere", 9979010, unix.Mkdev(0xfe, 1), 0, false},
		{"by a process that is not seen from here", 5, unix.Mkdev(0, 0x2a), 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if pid, ok := lockHolder(locks, tc.dev, tc.ino); pid != tc.want || ok != tc.ok {
				t.Errorf("lockHolder\n got %d, %v\nwant %d, %v", pid, ok, tc.want, tc.ok)
			}
		})
	}
}

// TestIsEnding looks at this process, under the name of a daemon that ends and under
// its own, at one that was killed and nobody has waited for, and at none.
func TestIsEnding(t *testing.T) {
	if isEnding(os.Getpid()) {
		t.Error("a process that goes on is taken for one that ends")
	}
	undo := beginEnding()
	if !isEnding(os.Getpid()) {
		t.Error("a daemon that stops is not taken for one that ends")
	}
	undo()
	if isEnding(os.Getpid()) {
		t.Error("the name was not taken back")
	}

	for _, tc := range []struct {
		name string
		want bool
	}{
		{"blksnap-dead", true},
		{"another", false},
	} {
		path := filepath.Join(t.TempDir(), tc.name)
		if out, err := exec.Command("cp", "/bin/sleep", path).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		cmd := exec.Command(path, "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if isEnding(cmd.Process.Pid) {
			t.Errorf("%s, which runs, is taken for one that ends", tc.name)
		}
		syscall.Kill(cmd.Process.Pid, syscall.SIGKILL)
		for zombie := false; !zombie; time.Sleep(time.Millisecond) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			zombie = strings.Contains(string(stat), ") Z ")
		}
		if got := isEnding(cmd.Process.Pid); got != tc.want {
			t.Errorf("%s, which was killed, is taken for a daemon that ends: %v, want %v", tc.name, got, tc.want)
		}
		cmd.Wait()
		if !isEnding(cmd.Process.Pid) {
			t.Errorf("%s is gone, and not taken for one that has ended", tc.name)
		}
	}
}

// TestAfterEnd opens a file that is locked: by a process that goes on, by one that is
// ending, which lets go in the end, and by nobody any more.
func TestAfterEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "origin")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	tries := 0
	open := func(busy int) func() (int, error) {
		tries = 0
		return func() (int, error) {
			if tries++; tries <= busy {
				return 0, syscall.EBUSY
			}
			return tries, nil
		}
	}
	if _, err := afterEnd(t.Context(), path, open(5)); !errors.Is(err, syscall.EBUSY) || tries != 2 {
		t.Errorf("locked by a process that goes on: got %v after %d tries, want %v after 2", err, tries, syscall.EBUSY)
	}
	undo := beginEnding()
	if n, err := afterEnd(t.Context(), path, open(5)); n != 6 || err != nil {
		t.Errorf("locked by a process that ends: got try %d, %v, want try 6", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := afterEnd(ctx, path, open(5)); !errors.Is(err, context.Canceled) {
		t.Errorf("told to stop: got %v, want %v", err, context.Canceled)
	}
	undo()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if n, err := afterEnd(t.Context(), path, open(1)); n != 2 || err != nil {
		t.Errorf("let go meanwhile: got try %d, %v, want try 2", n, err)
	}
	if _, err := afterEnd(t.Context(), path, open(5)); !errors.Is(err, syscall.EBUSY) || tries != 2 {
		t.Errorf("in use in another way: got %v after %d tries, want %v after 2", err, tries, syscall.EBUSY)
	}
}
