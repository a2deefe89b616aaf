// Origins and snapstores of a daemon that is just ending: their locks fall when its
// last thread has ended, and a start waits for that, as it does for the lock of the
// run directory, which is another one if the daemon was another one's.
//
// Who holds a lock is in /proc/locks, and whether that is ending in /proc: a daemon
// that stops changes its name there, and one that was killed is a zombie until its
// last thread has ended, or has the signal pending.
//
// A thread that waits for an answer of its own process' tree cannot be killed, and the
// process does not end as long as it holds that tree's connection. The next start cuts
// that off, where it is told to mount its tree on the same directory.

package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"blksnap/fusefs"
)

// endingName is what a daemon that stops is called.
const endingName = "blksnap-ending"

// beginEnding gives the process that name; the function takes it back.
func beginEnding() (undo func()) {
	const name = "/proc/self/comm"
	before, err := os.ReadFile(name)
	if err != nil {
		return func() {}
	}
	call := func(b []byte) { os.WriteFile(name, b, 0) } // who starts then is refused at once, no more
	call([]byte(endingName))
	return func() { call(bytes.TrimSpace(before)) }
}

// afterEnd calls open, and again where that fails with EBUSY because a daemon that is
// ending has the file or device at path locked, for up to stopWait.
func afterEnd[T any](ctx context.Context, path string, open func() (T, error)) (T, error) {
	deadline := time.Now().Add(stopWait)
	for again := false; ; {
		v, err := open()
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return v, err
		}
		pid, ok := lockedBy(path)
		ending := ok && isEnding(pid)
		if !ending && again {
			return v, err
		}
		again = !ending // who had it may have ended before we looked
		select {
		case <-ctx.Done():
			return v, ctx.Err()
		case <-time.After(lockRetry):
		}
	}
}

// lockedBy returns the process that has path locked with flock, as far as can be found
// out.
func lockedBy(path string) (pid int, ok bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, false
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0, false
	}
	return lockHolder(string(locks), uint64(st.Dev), st.Ino)
}

// lockHolder returns the process that has a file locked with flock, by a text as that
// of /proc/locks: lines such as "1: FLOCK  ADVISORY  WRITE 1234 fe:00:9979010 0 EOF",
// and, for those who wait for the lock, "1: -> FLOCK ...".
func lockHolder(locks string, dev, ino uint64) (pid int, ok bool) {
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(dev), unix.Minor(dev), ino)
	for line := range strings.Lines(locks) {
		words := strings.Fields(line)
		if len(words) > 5 && words[1] == "FLOCK" && words[5] == file {
			pid, err := strconv.Atoi(words[4])
			return pid, err == nil && pid > 0 // not: in another namespace
		}
	}
	return 0, false
}

// isEnding says whether a process is a daemon that stops, or was killed.
func isEnding(pid int) bool {
	name, killed, err := processState(pid)
	if err != nil {
		return errors.Is(err, os.ErrNotExist) // it has ended
	}
	return name == endingName || killed && isDaemon(name)
}

func isDaemon(name string) bool { return strings.HasPrefix(name, "blksnap") }

// processState returns what a process is called, and whether it was killed: then its
// first thread has ended, or waits for what cannot be interrupted.
func processState(pid int) (name string, killed bool, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return "", false, err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":\t")
		switch key {
		case "Name":
			name = value
		case "State":
			killed = strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X")
		case "SigPnd", "ShdPnd":
			pending, _ := strconv.ParseUint(value, 16, 64)
			killed = killed || pending>>(unix.SIGKILL-1)&1 != 0
		}
	}
	return name, killed, nil
}

// freeKilled lets the daemon end that has locked dir, was killed, and hangs in its own
// tree, which nobody serves any more: then its locks fall. Another daemon's tree is left
// alone, also where it does not answer.
func (s *service) freeKilled(ctx context.Context, dir string) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil || s.set.mount == "" {
		return // whoever locks it will say why
	}
	defer f.Close()
	text, _, _ := (&dirLock{f}).read()
	pid, err := strconv.Atoi(text)
	if err != nil {
		return
	}
	if name, killed, err := processState(pid); err != nil || !killed || !isDaemon(name) {
		return
	}
	done, err := fusefs.AbortUnserved(ctx, s.set.mount, pid)
	if err != nil {
		s.log.Warn("the tree of a daemon that was killed does not end", "dir", s.set.mount, "err", err)
	} else if done {
		s.log.Info("the tree of a daemon that was killed was cut off", "dir", s.set.mount, "pid", pid)
	}
}
