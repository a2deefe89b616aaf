package fusefs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serveVar is the environment variable by which a test makes this binary mount
// a tree on its value, say so, and serve it until it is killed.
const serveVar = "FUSEFS_TEST_SERVE"

// stallVar makes that tree say so, and not answer, when it is asked for what the
// variable says: its version, or the snapshot "slow".
const stallVar = "FUSEFS_TEST_STALL"

// stalling is a source that never answers one question.
type stalling struct {
	*fakeSource
	question string
}

func (s stalling) Version() string {
	if s.question == "version" {
		fmt.Println("asked")
		select {}
	}
	return s.fakeSource.Version()
}

func (s stalling) Snapshot(name string) (Snapshot, bool) {
	if name == s.question {
		s.force("one") // which has to be told meanwhile
		fmt.Println("asked")
		select {}
	}
	return s.fakeSource.Snapshot(name)
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(serveVar); dir != "" {
		serveForever(dir)
	}
	os.Exit(m.Run())
}

func serveForever(dir string) {
	fake := newFakeSource()
	fake.add("vda", make([]byte, 1<<20))
	fake.Take("one")
	src := Source(fake)
	if question := os.Getenv(stallVar); question != "" {
		src = stalling{fake, question}
	}
	tree, err := Mount(context.Background(), src, Options{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fake.tree = tree
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the test ends, however it does
	tree.Unmount(context.Background())
	os.Exit(0)
}

// startServer starts a process that serves a tree on dir, and kills it when the
// test ends.
func startServer(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd, _ := startServerThat(t, dir, "ready")
	return cmd
}

// startServerThat returns when the process says the word, with what it says then.
func startServerThat(t *testing.T, dir, word string, env ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	need(t, "/dev/fuse")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), serveVar+"="+dir), env...)
	_, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(cmd)
		unmountAll(t, dir)
	})
	said := bufio.NewReader(out)
	if line, err := said.ReadString('\n'); line != word+"\n" {
		t.Fatalf("the server said %q, error %v", line, err)
	}
	return cmd, said
}

func kill(cmd *exec.Cmd) {
	cmd.Process.Kill()
	cmd.Wait()
}

// unmountAll takes away what a test has left mounted on dir.
func unmountAll(t testing.TB, dir string) {
	for {
		if _, ok, err := mountAt(dir); !ok || err != nil {
			return
		}
		if err := unmount(context.Background(), dir, detach); err != nil {
			t.Errorf("unmount what is left: %v", err)
			return
		}
	}
}

// TestKilledBeforeItsFirstAnswer kills a process that waits for an answer of its own
// tree: it ends, and so do its locks.
func TestKilledBeforeItsFirstAnswer(t *testing.T) {
	dir := t.TempDir()
	server, _ := startServerThat(t, dir, "asked", stallVar+"=version")
	wantEnd(t, dir, server)
}

// TestKilledWhileItTellsOfWhatIsGone kills a process that has to tell the kernel of a
// snapshot that is gone while somebody looks up another, and the kernel holds a lock
// for that. A correct tree passes each time; one that waits for the lock is found if
// it does so within the time that it is given.
func TestKilledWhileItTellsOfWhatIsGone(t *testing.T) {
	dir := t.TempDir()
	server, said := startServerThat(t, dir, "ready", stallVar+"=slow")
	if _, err := os.ReadFile(filepath.Join(dir, "snapshots/one/vda.img")); err != nil {
		t.Fatal(err)
	}
	looked := make(chan error, 1)
	go func() {
		_, err := os.Stat(filepath.Join(dir, "snapshots/slow"))
		looked <- err
	}()
	if line, err := said.ReadString('\n'); line != "asked\n" {
		t.Fatalf("the server said %q, error %v", line, err)
	}
	time.Sleep(100 * time.Millisecond)
	wantEnd(t, dir, server)
	if err := <-looked; err == nil {
		t.Error("a snapshot was found by nobody's answer")
	}
}

// wantEnd kills the server of the tree on dir.
func wantEnd(t *testing.T, dir string, server *exec.Cmd) {
	t.Helper()
	m, ok, err := mountAt(dir)
	if !ok || err != nil {
		t.Fatalf("the tree is not mounted: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		kill(server)
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a process that was killed does not end")
		if err := abort(m.dev); err != nil {
			t.Error(err)
		}
		<-ended
	}
}

// TestStaleMount mounts over what killed processes have left behind.
func TestStaleMount(t *testing.T) {
	for _, tc := range []struct {
		name string
		more int // dead mounts over the first
		open bool
		seen bool // the kernel remembers the attributes of its root
	}{
		{"one", 0, false, false},
		{"one that somebody has looked at", 0, false, true},
		{"a file of it is still open", 0, true, false},
		{"three, one over the other", 2, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			server := startServer(t, dir)
			if tc.open {
				open(t, filepath.Join(dir, "snapshots/one/vda.img"))
			}
			if tc.seen {
				if _, err := os.Stat(dir); err != nil {
					t.Fatal(err)
				}
			}
			kill(server)
			if tc.more > 0 && os.Geteuid() != 0 {
				t.Skip("fusermount3 mounts nothing over a dead mount")
			}
			for range tc.more {
				fd, err := attach(t.Context(), dir, false)
				if err != nil {
					t.Fatal(err)
				}
				unix.Close(fd) // as the kernel does for a process that dies
			}
			_, err := os.ReadDir(dir)
			wantErrno(t, "listing of the dead mount", err, syscall.ENOTCONN)

			_, mounted := mountFake(t, newFakeSource(), func(o *Options) { o.Dir = dir })
			if got, want := run(t, mounted, "cat version"), "blksnap 0.0.0\n"; got != want {
				t.Errorf("version\n got %q\nwant %q", got, want)
			}
		})
	}
}

// TestMountRefuses gives Mount what it must not mount on. The error is one line
// that names the directory, and everything stays as it was.
func TestMountRefuses(t *testing.T) {
	need(t, "/dev/fuse")
	full := t.TempDir()
	file := filepath.Join(full, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	live := t.TempDir()
	startServer(t, live)
	hung := t.TempDir()
	startServer(t, hung).Process.Signal(syscall.SIGSTOP)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(live, link); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, dir string
		create    bool
		want      error
	}{
		{"missing", full + "/none", false, os.ErrNotExist},
		{"missing with its parent", full + "/none/none", false, os.ErrNotExist},
		{"a file", file, false, syscall.ENOTDIR},
		{"a file, to be created", file, true, syscall.ENOTDIR},
		{"below a file", file + "/none", true, syscall.ENOTDIR},
		{"not empty", full, false, syscall.ENOTEMPTY},
		{"not empty, to be created", full, true, syscall.ENOTEMPTY},
		{"another tree", live, false, syscall.EBUSY},
		{"another tree by a link", link, false, syscall.EBUSY},
		{"another tree that hangs", hung, false, syscall.EBUSY},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tree, err := Mount(t.Context(), newFakeSource(), Options{Dir: tc.dir, Create: tc.create, Log: testLog(t)})
			if err == nil {
				tree.Unmount(context.Background())
			}
			if !errors.Is(err, tc.want) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), filepath.Dir(tc.dir)) && tc.dir != link {
				t.Errorf("Mount(%s)\n got %q\nwant one line that names it: %v", tc.dir, err, tc.want)
			}
		})
	}
	if got, want := run(t, live, "cat version"), "blksnap 0.0.0\n"; got != want {
		t.Errorf("the other tree's version\n got %q\nwant %q", got, want)
	}
}

// TestMountCreates mounts on directories that Mount has to make or to find.
func TestMountCreates(t *testing.T) {
	tmp := t.TempDir()
	if err := os.Symlink(tmp, tmp+"/link"); err != nil {
		t.Fatal(err)
	}
	odd := "/a b\\c,d'\t$x"
	for _, tc := range []struct{ name, dir, want string }{
		{"new", tmp + "/new", tmp + "/new"},
		{"there already", tmp + "/new", tmp + "/new"},
		{"parents too", tmp + "/p/q/r", tmp + "/p/q/r"},
		{"by a link", tmp + "/link/new", tmp + "/new"},
		{"not clean", tmp + "/./new/../new/", tmp + "/new"},
		{"odd characters", tmp + odd, tmp + odd},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tree, _ := mountFake(t, newFakeSource(), func(o *Options) { o.Dir, o.Create = tc.dir, true })
			if got := tree.Dir(); got != tc.want {
				t.Errorf("Dir\n got %q\nwant %q", got, tc.want)
			}
			got, err := os.ReadFile(tc.want + "/version")
			if want := "blksnap 0.0.0\n"; string(got) != want || err != nil {
				t.Errorf("version\n got %q %v\nwant %q", got, err, want)
			}
		})
	}
}

// TestMountTable shows what mount(8) and df say.
func TestMountTable(t *testing.T) {
	_, dir := mountFake(t, newFakeSource())
	got := run(t, "/", "findmnt -no SOURCE,FSTYPE %s; df -B1 --output=source,size,used,avail %s | tail -1 | tr -s ' '", dir, dir)
	want := "blksnap fuse.blksnap\nblksnap 1073741824 536870912 536870912\n"
	if got != want {
		t.Errorf("findmnt, df\n got %s\nwant %s", got, want)
	}
}

// TestUnmountOutside unmounts the tree by umount(8), as root may: the tree says
// so, and a later Unmount is no error.
func TestUnmountOutside(t *testing.T) {
	tree, dir := mountFake(t, newFakeSource())
	select {
	case <-tree.Done():
		t.Fatal("done while it is mounted")
	default:
	}
	if os.Geteuid() == 0 {
		run(t, "/", "umount %s", dir)
	} else {
		run(t, "/", "fusermount3 -u %s", dir)
	}
	wait(t, "Done", tree.Done())

	// What is mounted there now is another's, and stays.
	other, _ := mountFake(t, newFakeSource(), func(o *Options) { o.Dir = dir })
	if err := tree.Unmount(t.Context()); err != nil {
		t.Errorf("Unmount after umount: %v", err)
	}
	select {
	case <-other.Done():
		t.Error("Unmount has unmounted another tree")
	default:
		run(t, dir, "cat version")
	}
}

// wait waits until c is closed.
func wait(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not come", what)
	}
}

// TestUnmountInUse unmounts while a file of an image is open: the open file gets
// errors, and the image is released, so that its snapshot can be destroyed.
func TestUnmountInUse(t *testing.T) {
	for _, name := range []string{"vda.img", "vda.qcow2"} {
		t.Run(name, func(t *testing.T) {
			src := newFakeSource()
			src.add("vda", make([]byte, 1<<20))
			src.Take("one")
			tree, dir := mountFake(t, src)
			f := open(t, filepath.Join(dir, "snapshots/one", name))
			p := make([]byte, 4096)
			if _, err := f.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
			wantErrno(t, "destroy while it is open", src.Destroy("one"), syscall.EBUSY)

			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if err := tree.Unmount(ctx); err != nil {
				t.Fatal(err)
			}
			wait(t, "Done", tree.Done())
			if _, err := f.ReadAt(p, 0); err == nil {
				t.Error("a read after unmount succeeds")
			}
			if err := src.Destroy("one"); err != nil {
				t.Errorf("destroy after unmount: %v", err)
			}
		})
	}
}

// TestUnmountElsewhereMounted unmounts a tree of which another mount namespace
// has a copy, so that the kernel goes on with it.
func TestUnmountElsewhereMounted(t *testing.T) {
	needRoot(t, "only root can make a mount namespace")
	need(t, "unshare")
	tree, dir := mountFake(t, newFakeSource())
	other := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read end")
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err == nil {
		err = other.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); other.Wait() })
	bufio.NewReader(out).ReadString('\n')

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := tree.Unmount(ctx); err != nil {
		t.Fatal(err)
	}
	_, err = os.ReadFile(fmt.Sprintf("/proc/%d/root%s/version", other.Process.Pid, dir))
	wantErrno(t, "read in the other namespace", err, syscall.ENOTCONN)
}

// TestUnmountWhileTaking unmounts while mkdir waits for its snapshot: Unmount
// gives up waiting when it is told to, and the tree ends when the Source does.
func TestUnmountWhileTaking(t *testing.T) {
	src := newFakeSource()
	entered, release := make(chan struct{}), make(chan struct{})
	src.taking = func() { close(entered); <-release }
	tree, dir := mountFake(t, src)
	made := make(chan error, 1)
	go func() { made <- os.Mkdir(filepath.Join(dir, "snapshots/one"), 0o755) }()
	wait(t, "Take", entered)

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := tree.Unmount(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unmount while Take runs\n got %v\nwant %v", err, context.DeadlineExceeded)
	}
	if err := <-made; err == nil {
		t.Error("mkdir succeeds on a tree that was unmounted")
	}
	close(release)
	wait(t, "Done", tree.Done())
}

// TestUnprivileged runs other tests of this package as the user nobody, in a
// mount namespace of its own where every user may open /dev/fuse.
func TestUnprivileged(t *testing.T) {
	needRoot(t, "only root can become another user")
	need(t, "/dev/fuse", "fusermount3", "unshare", "setpriv")
	tmp, err := os.MkdirTemp("", "fusefs") // t.TempDir is below one that nobody can enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	self, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(tmp+"/test", self, 0o755)
	}
	if err == nil {
		err = os.Mkdir(tmp+"/home", 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	const script = `
set -e
cd $1
chmod 755 . && chmod 777 home
mknod fuse c 10 229 && chmod 666 fuse
mount --bind fuse /dev/fuse
mountpoint -q /sys/fs/fuse/connections || mount -t fusectl none /sys/fs/fuse/connections
export TMPDIR=$1/home
exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=+all ./test -test.v -test.count=1 \
	-test.run '^(TestFiles|TestStaleMount|TestMountRefuses|TestUnmountOutside|TestUnmountInUse|TestMountHelperSaysWhy|TestSnapshotTakeDestroy|TestImageCopies)$'
`
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "slave", "bash", "-c", script, "bash", tmp).CombinedOutput()
	t.Logf("as nobody:\n%s", out)
	if err != nil {
		t.Error(err)
	}
	for _, test := range []string{"TestStaleMount", "TestMountHelperSaysWhy", "TestImageCopies"} {
		if !strings.Contains(string(out), "--- PASS: "+test+" ") {
			t.Errorf("%s did not run and pass as nobody", test)
		}
	}
}

// TestMountHelperSaysWhy asks for what fusermount3 refuses: its reason is in the
// error.
func TestMountHelperSaysWhy(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("run by TestUnprivileged")
	}
	conf, err := os.ReadFile("/etc/fuse.conf")
	if err == nil && strings.Contains("\n"+string(conf), "\nuser_allow_other") {
		t.Skip("/etc/fuse.conf allows allow_other")
	}
	_, err = Mount(t.Context(), newFakeSource(), Options{Dir: t.TempDir(), AllowOther: true, Log: testLog(t)})
	if err == nil || !strings.Contains(err.Error(), "user_allow_other") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Mount with AllowOther\n got %v\nwant one line that names user_allow_other", err)
	}
}

// TestAllowOther uses a tree of root as the user nobody.
func TestAllowOther(t *testing.T) {
	needRoot(t, "only root can become another user")
	need(t, "setpriv")
	for _, tc := range []struct {
		name, command string
		allow, works  bool
	}{
		{"not allowed", "cat version", false, false},
		{"read a state", "cat snapshots/one/vda.state", true, true},
		{"list", "ls -l snapshots/one", true, true},
		{"read the changes", "cat snapshots/one/vda.cbt/since/all", true, true},
		{"read an image", "cat snapshots/one/vda.img", true, false},
		{"take", "mkdir snapshots/two", true, false},
		{"destroy", "rmdir snapshots/one", true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src := newFakeSource()
			src.add("vda", make([]byte, 1<<20))
			src.Take("one")
			dir, err := os.MkdirTemp("", "fusefs")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(dir) })
			os.Chmod(dir, 0o755)
			mountFake(t, src, func(o *Options) { o.Dir, o.AllowOther = dir, tc.allow })
			out, stderr, err := try(t, "/", "setpriv --reuid=65534 --regid=65534 --clear-groups bash -c 'cd %s && %s'", dir, tc.command)
			if works := err == nil; works != tc.works {
				t.Errorf("%s as nobody\n got %v\nwant %v\n%s%s", tc.command, works, tc.works, out, stderr)
			}
		})
	}
}

// TestConnectionCut cuts the tree's connection: the tree says so, and Unmount
// clears the dead mount.
func TestConnectionCut(t *testing.T) {
	needRoot(t, "only root finds fusectl everywhere")
	tree, dir := mountFake(t, newFakeSource())
	if err := abort(tree.dev); err != nil {
		t.Fatal(err)
	}
	wait(t, "Done", tree.Done())
	_, err := os.ReadFile(dir + "/version")
	wantErrno(t, "read", err, syscall.ENOTCONN)
	if err := tree.Unmount(t.Context()); err != nil {
		t.Errorf("Unmount: %v", err)
	}
	if _, ok, _ := mountAt(dir); ok {
		t.Error("the dead mount is still there")
	}
}

// TestAbortUnserved cuts off a tree that does not answer, and nothing else.
func TestAbortUnserved(t *testing.T) {
	needRoot(t, "only root can mount what it wants")
	need(t, "/dev/fuse")
	_, alive := mountFake(t, newFakeSource())
	cut, dead := mountFake(t, newFakeSource())
	if err := abort(cut.dev); err != nil {
		t.Fatal(err)
	}
	wait(t, "Done", cut.Done())
	ours := os.Getpid()
	for _, tc := range []struct {
		name, dir string
		pid       int
		want      bool
	}{
		{"no mount", t.TempDir(), ours, false},
		{"a tree that is alive", alive, ours, false},
		{"a tree that is dead", dead, ours, false},
		{"what nobody serves", mountUnserved(t, "fuse.other"), ours, false},
		{"a tree that nobody serves", mountUnserved(t, fsType), ours, true},
		{"one that another process does not serve", mountUnserved(t, fsType), sleeps(t), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, err := AbortUnserved(t.Context(), tc.dir, tc.pid); got != tc.want || err != nil {
				t.Errorf("got %v, %v, want %v", got, err, tc.want)
			}
		})
	}
	if text, err := os.ReadFile(alive + "/version"); err != nil || len(text) == 0 {
		t.Errorf("the tree that is alive: %q, %v", text, err)
	}
	if err := answers(t.Context(), dead); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("the tree that is dead: %v", err)
	}
}

// mountUnserved mounts a file system that answers nothing.
func mountUnserved(t *testing.T, kind string) (dir string) {
	t.Helper()
	dir, f := mountFile(t, kind)
	t.Cleanup(func() { f.Close() })
	return dir
}

// mountFile mounts a file system whose connection is f.
func mountFile(t *testing.T, kind string) (dir string, f *os.File) {
	t.Helper()
	dir = t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f = os.NewFile(uintptr(fd), "/dev/fuse")
	if err := unix.Mount("blksnap", dir, kind, 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir, f
}

// TestDeadMountOfOthers leaves a dead mount of another kind alone.
func TestDeadMountOfOthers(t *testing.T) {
	needRoot(t, "only root can mount what it wants")
	need(t, "/dev/fuse")
	dir := t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.Mount("other", dir, "fuse.other", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd))
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmountAll(t, dir) })
	_, err = Mount(t.Context(), newFakeSource(), Options{Dir: dir, Log: testLog(t)})
	wantErrno(t, "Mount", err, syscall.ENOTCONN)
	if m, _, _ := mountAt(dir); m.fsType != "fuse.other" {
		t.Errorf("mounted now\n got %q\nwant %q", m.fsType, "fuse.other")
	}
}

// TestPanicIsAnError lets the Source panic: the request fails, the tree goes on.
func TestPanicIsAnError(t *testing.T) {
	src := newFakeSource()
	src.taking = func() { panic("a bug") }
	_, dir := mountFake(t, src)
	wantErrno(t, "mkdir", os.Mkdir(filepath.Join(dir, "snapshots/one"), 0o755), syscall.EIO)
	f := open(t, filepath.Join(dir, "version"))
	if got, err := io.ReadAll(f); string(got) != "blksnap 0.0.0\n" || err != nil {
		t.Errorf("version after a panic\n got %q %v\nwant %q", got, err, "blksnap 0.0.0\n")
	}
}
