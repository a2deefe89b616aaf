// A disk that hangs, or fails, from a chosen call on.

package test

import (
	"slices"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// badDisk is a directory, as others see it through FUSE. It knows its calls by what they do
// and to which name, such as "open lock".
type badDisk struct {
	fuse.RawFileSystem
	dir string // where it is mounted

	mu     sync.Mutex
	names  map[uint64]string // by node
	calls  []string          // each once, as they came
	from   string            // the call that all is bad from; empty: none
	bad    bool
	answer fuse.Status   // of all calls then; OK: they wait
	healed chan struct{} // closed when they need not wait any more
}

// newBadDisk mounts one that is good yet, until the test ends.
func newBadDisk(t *testing.T) *badDisk {
	t.Helper()
	root, err := fs.NewLoopbackRoot(scratch(t))
	if err != nil {
		t.Fatal(err)
	}
	b := &badDisk{RawFileSystem: fs.NewNodeFS(root, &fs.Options{}), dir: scratch(t), names: make(map[uint64]string), healed: make(chan struct{})}
	server, err := fuse.NewServer(b, b.dir, &fuse.MountOptions{DirectMountStrict: true, Name: "bad", EnableLocks: true, DisableReadDirPlus: true})
	if err != nil {
		t.Fatal(err)
	}
	keepFuse(t)
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.heal()
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount the bad disk: %v", err)
		}
		server.Wait()
	})
	return b
}

// spoil has the disk answer nothing else but answer, or, for OK, nothing, from the next call
// of that kind on.
func (b *badDisk) spoil(from string, answer fuse.Status) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from, b.answer, b.calls = from, answer, nil
}

// heal makes it good again.
func (b *badDisk) heal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from, b.bad = "", false
	close(b.healed)
	b.healed = make(chan struct{})
}

// isBad says whether the call has come.
func (b *badDisk) isBad() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bad
}

// said are the kinds of calls that came since the disk was made or spoilt.
func (b *badDisk) said() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.calls)
}

// ask says what a call has to answer, if it is not OK. It waits as long as the call has to.
func (b *badDisk) ask(op string, node uint64, name string) fuse.Status {
	b.mu.Lock()
	if name == "" {
		name = b.names[node]
	}
	call := op + " " + name
	if !slices.Contains(b.calls, call) {
		b.calls = append(b.calls, call)
	}
	b.bad = b.bad || call == b.from
	bad, answer, healed := b.bad, b.answer, b.healed
	b.mu.Unlock()
	if !bad {
		return fuse.OK
	}
	if answer == fuse.OK {
		<-healed
	}
	return answer
}

// entry notes the name of a node.
func (b *badDisk) entry(name string, node uint64, s fuse.Status) fuse.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s == fuse.OK {
		b.names[node] = name
	}
	return s
}

// Init keeps reads and writes from going straight to the files below.
func (b *badDisk) Init(*fuse.Server) {}

func (b *badDisk) Lookup(c <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if s := b.ask("lookup", h.NodeId, name); s != fuse.OK {
		return s
	}
	return b.entry(name, out.NodeId, b.RawFileSystem.Lookup(c, h, name, out))
}

func (b *badDisk) GetAttr(c <-chan struct{}, input *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if s := b.ask("getattr", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.GetAttr(c, input, out)
}

func (b *badDisk) SetAttr(c <-chan struct{}, input *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if s := b.ask("setattr", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.SetAttr(c, input, out)
}

func (b *badDisk) Open(c <-chan struct{}, input *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s := b.ask("open", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Open(c, input, out)
}

func (b *badDisk) SetLk(c <-chan struct{}, input *fuse.LkIn) fuse.Status {
	if s := b.ask("lock", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.SetLk(c, input)
}

func (b *badDisk) Flush(c <-chan struct{}, input *fuse.FlushIn) fuse.Status {
	if s := b.ask("close", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Flush(c, input)
}

func (b *badDisk) Fsync(c <-chan struct{}, input *fuse.FsyncIn) fuse.Status {
	if s := b.ask("sync", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Fsync(c, input)
}

func (b *badDisk) Fallocate(c <-chan struct{}, input *fuse.FallocateIn) fuse.Status {
	if s := b.ask("fallocate", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Fallocate(c, input)
}

func (b *badDisk) Lseek(c <-chan struct{}, input *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if s := b.ask("seek", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Lseek(c, input, out)
}

func (b *badDisk) OpenDir(c <-chan struct{}, input *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s := b.ask("opendir", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.OpenDir(c, input, out)
}

func (b *badDisk) ReadDir(c <-chan struct{}, input *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if s := b.ask("readdir", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.ReadDir(c, input, out)
}

func (b *badDisk) FsyncDir(c <-chan struct{}, input *fuse.FsyncIn) fuse.Status {
	if s := b.ask("syncdir", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.FsyncDir(c, input)
}

func (b *badDisk) StatFs(c <-chan struct{}, input *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if s := b.ask("statfs", input.NodeId, ""); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.StatFs(c, input, out)
}

func (b *badDisk) Read(c <-chan struct{}, input *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if s := b.ask("read", input.NodeId, ""); s != fuse.OK {
		return nil, s
	}
	return b.RawFileSystem.Read(c, input, buf)
}

func (b *badDisk) Write(c <-chan struct{}, input *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if s := b.ask("write", input.NodeId, ""); s != fuse.OK {
		return 0, s
	}
	return b.RawFileSystem.Write(c, input, data)
}

func (b *badDisk) Writev(c <-chan struct{}, input *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if s := b.ask("write", input.NodeId, ""); s != fuse.OK {
		return 0, s
	}
	return b.RawFileSystem.Writev(c, input, data)
}

func (b *badDisk) Mkdir(c <-chan struct{}, input *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if s := b.ask("mkdir", input.NodeId, name); s != fuse.OK {
		return s
	}
	return b.entry(name, out.NodeId, b.RawFileSystem.Mkdir(c, input, name, out))
}

func (b *badDisk) Create(c <-chan struct{}, input *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if s := b.ask("create", input.NodeId, name); s != fuse.OK {
		return s
	}
	return b.entry(name, out.NodeId, b.RawFileSystem.Create(c, input, name, out))
}

func (b *badDisk) Unlink(c <-chan struct{}, input *fuse.InHeader, name string) fuse.Status {
	if s := b.ask("remove", input.NodeId, name); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Unlink(c, input, name)
}

func (b *badDisk) Rename(c <-chan struct{}, input *fuse.RenameIn, from, to string) fuse.Status {
	if s := b.ask("rename", input.NodeId, to); s != fuse.OK {
		return s
	}
	return b.RawFileSystem.Rename(c, input, from, to)
}
