package fusefs

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKernelIsTold watches a device and a snapshot that go otherwise than by
// rmdir: the watchers are told, and neither the kernel nor the tree holds on to
// what is gone.
func TestKernelIsTold(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192))
	src.add("vdb", make([]byte, 8192))
	src.Take("one")
	src.Take("two")
	tree, dir := mountFake(t, src)
	run(t, dir, "find . -ls > /dev/null")
	events := watch(t, dir+"/devices/vdb", dir+"/snapshots/one")

	src.force("one")
	src.remove("vdb")
	got := []string{<-events, <-events}
	if want := []string{"one", "vdb"}; !slices.Equal(got, want) {
		t.Errorf("directories of which the kernel says that they are gone\n got %v\nwant %v", got, want)
	}
	eventually(t, "the tree's nodes", func() error {
		for parent, name := range map[string]string{"devices": "vdb", "snapshots": "one"} {
			if n := tree.top.GetChild(parent).GetChild(name); n != nil {
				return fmt.Errorf("%s is still known", name)
			}
		}
		return nil
	})
	if tree.top.GetChild("snapshots").GetChild("two") == nil {
		t.Error("a snapshot that is there was forgotten")
	}
}

// watch returns, as they come, which of the directories are gone.
func watch(t *testing.T, dirs ...string) <-chan string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	names := map[int32]string{}
	for _, dir := range dirs {
		wd, err := unix.InotifyAddWatch(fd, dir, unix.IN_DELETE_SELF|unix.IN_ONLYDIR)
		if err != nil {
			t.Fatal(err)
		}
		names[int32(wd)] = filepath.Base(dir)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	f.SetDeadline(time.Now().Add(20 * time.Second))
	events := make(chan string, 10)
	go func() {
		defer close(events)
		defer f.Close()
		event := make([]byte, unix.SizeofInotifyEvent)
		for n := 0; n < len(dirs); {
			if _, err := f.Read(event); err != nil {
				events <- err.Error()
				return
			}
			if binary.NativeEndian.Uint32(event[4:])&unix.IN_DELETE_SELF != 0 {
				events <- names[int32(binary.NativeEndian.Uint32(event))]
				n++
			}
		}
	}()
	return events
}

// TestTakenAgainIsNotForgotten tells the tree of a snapshot that is gone when
// there is another of that name: the new one is not touched.
func TestTakenAgainIsNotForgotten(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192))
	src.Take("one")
	tree, dir := mountFake(t, src)
	inside := open(t, filepath.Join(dir, "snapshots/one"))
	tree.forget(departure{"snapshots", "one"}) // late news of an earlier one
	if _, err := os.Stat(fmt.Sprintf("/proc/self/fd/%d/vda.img", inside.Fd())); err != nil {
		t.Errorf("stat inside: %v", err)
	}
	if n := tree.top.GetChild("snapshots").GetChild("one"); n == nil {
		t.Error("the new snapshot was forgotten")
	}
}
