// The first requests of a tree, which it makes itself.

package fusefs

import (
	"fmt"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// firstAnswer makes the tree answer its first requests, of which one is a poll.
// go-fuse does not know poll, and the kernel, told so once, never asks again.
// Otherwise the first file of the tree that this very process opens could stop
// it: the Go runtime polls files in a way that holds up the goroutine that is to
// answer. conn is the file descriptor of the connection.
//
// Who is killed while it waits for its own answer would never end: the thread that
// waits does so until the connection is cut, which is when the last descriptor of
// it is closed, which is when the last thread ends that shares them. So a thread of
// its own waits, with descriptors of its own and without that one. It ends with the
// goroutine, since it is never unlocked.
func (t *Tree) firstAnswer(conn int) error {
	answer := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// Where this is forbidden, as in some containers, it is done all the same.
		if unix.Unshare(unix.CLONE_FILES) == nil {
			unix.Close(conn) // in this thread's table alone
		}
		answer <- t.pollFirst()
	}()
	return <-answer
}

func (t *Tree) pollFirst() error {
	fd, err := unix.Open(filepath.Join(t.dir, "version"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open its first file: %w", err)
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}
