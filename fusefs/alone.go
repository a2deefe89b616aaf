// The thread that asks its own tree.

package fusefs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Who is killed while a thread of his waits for an answer of his own tree never ends:
// the thread waits until the connection is cut, which is when its last descriptor is
// closed, which is when the last thread ends that shares it. Nor does he while a thread
// tells the kernel by the connection of what is gone, because that waits for a lock
// which is held by others who wait for an answer.
//
// So all that is done by one thread that has descriptors of its own, and not that
// one. It is not used for anything else, and ends with its tree.

// Thread is that thread. What it leaves behind are copies of descriptors, which it has to
// close, and to close a file on FUSE or NFS may wait for its disk: so it is best made before
// anything is opened on a disk that may hang.
type Thread struct {
	work  chan func()
	ended chan struct{}
}

// NewThread starts a thread for a tree.
func NewThread() *Thread {
	th := &Thread{make(chan func()), make(chan struct{})}
	ready := make(chan struct{})
	go func() {
		defer close(th.ended)
		th.run(ready)
	}()
	<-ready
	return th
}

// do has the thread call f, and returns when that has ended.
func (th *Thread) do(f func()) {
	done := make(chan struct{})
	th.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// End ends the thread, after its tree.
func (th *Thread) End() {
	close(th.work)
	<-th.ended
}

// run does what it is told until there is no more. It closes ready when it begins.
func (th *Thread) run(ready chan<- struct{}) {
	runtime.LockOSThread() // and is never unlocked: the thread ends with the goroutine
	if unix.Gettid() == unix.Getpid() {
		// What /proc/self/fd shows is the main thread's. It waits for another.
		done := make(chan struct{})
		go func() {
			defer close(done)
			th.run(ready)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	leaveDescriptors()
	close(ready)
	for f := range th.work {
		f()
	}
}

// serveAlone makes the tree answer its first requests, says how that went, and tells
// the kernel of what is gone until the tree is unmounted.
func (t *Tree) serveAlone(first chan<- error) {
	t.alone.Store(int32(unix.Gettid()))
	err := t.firstAnswer()
	first <- err
	if err == nil {
		t.notify()
	}
}

// firstAnswer makes the tree answer its first requests, of which one is a poll.
// go-fuse does not know poll, and the kernel, told so once, never asks again.
// Otherwise the first file of the tree that this very process opens could stop
// it: the Go runtime polls files in a way that holds up the goroutine that is to
// answer.
func (t *Tree) firstAnswer() error {
	fd, err := unix.Open(filepath.Join(t.dir, "version"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open its first file: %w", err)
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}

// leaveDescriptors gives the calling thread a table of descriptors of its own, with
// nothing in it but the standard ones and those of the Go runtime, by which each
// thread may have to wake others: they are there, because a file was opened before.
// Where that is forbidden, as in some containers, the thread goes on with all of them.
func leaveDescriptors() {
	if unix.Unshare(unix.CLONE_FILES) != nil {
		return
	}
	const table = "/proc/thread-self/fd"
	dir, err := unix.Open(table, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	var open []int
	buf := make([]byte, 16<<10)
	for {
		n, err := unix.Getdents(dir, buf)
		if err != nil || n <= 0 {
			break
		}
		open = append(open, numbers(buf[:n])...)
	}
	for _, fd := range open {
		n, _ := unix.Readlink(table+"/"+strconv.Itoa(fd), buf)
		if fd > 2 && fd != dir && !strings.HasPrefix(string(buf[:max(n, 0)]), "anon_inode:") {
			unix.Close(fd)
		}
	}
	unix.Close(dir)
}

// numbers are the names in what getdents returned that are numbers. (Package os has
// no place here: whatever it opens may be closed by another thread, for which the
// number is another file's.)
func numbers(entries []byte) (all []int) {
	const size, name = 16, 19 // of an entry: offset of its length, and of its name
	for len(entries) > name {
		n := int(binary.NativeEndian.Uint16(entries[size:]))
		if n <= name || n > len(entries) {
			return all
		}
		text, _, _ := bytes.Cut(entries[name:n], []byte{0})
		if fd, err := strconv.Atoi(string(text)); err == nil {
			all = append(all, fd)
		}
		entries = entries[n:]
	}
	return all
}
