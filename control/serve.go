// serve: starting the daemon, waiting for its end, and stopping it, each in the
// order that keeps every promise.

package control

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"time"

	"blksnap/fusefs"
	"blksnap/store"
)

const (
	// minProcs is the least number of threads that run Go code at once: with
	// fewer, reads that wait for a disk starve the others (docs/measurements.md).
	minProcs = 8

	// unmountLimit is how long the tree may take to go.
	unmountLimit = 10 * time.Second
)

// Serve runs a daemon until ctx ends, or its tree is unmounted and its last
// client has left. It writes a line to out for each device, then `ready`, and
// its log to log. It returns nil after a clean stop.
func Serve(ctx context.Context, c Config, version string, out, log io.Writer) (err error) {
	tune()
	passed, err := passedSockets()
	if err != nil {
		return err
	}
	if passed != nil {
		out = log // stdout may be the one of who runs us
	}
	set, err := settle(c, passed != nil)
	if err != nil {
		return err
	}
	lines := newLogWriter()
	defer lines.stop()
	var level slog.Level
	if set.private != "" {
		level = slog.LevelWarn // who runs us for a moment shares its stderr
	}
	handler := slog.NewTextHandler(lines, &slog.HandlerOptions{Level: level})
	s := &service{set: set, version: version, log: slog.New(handler)}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.open(ctx, passed); err != nil {
		return err
	}
	if inBackground() {
		log = systemLog()
	}
	lines.start(log)
	s.served = true
	return s.run(ctx, out)
}

// tune sets up the process: room for reads that wait, files that are ours
// alone, and no death by a reader of our output that went away.
func tune() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(minProcs, runtime.GOMAXPROCS(0)))
	}
	syscall.Umask(0o077)
	signal.Ignore(syscall.SIGPIPE)
}

// service is a daemon with everything that stands around it while it runs.
type service struct {
	set     settings
	version string
	log     *slog.Logger

	daemon *Daemon
	nbdOn  []net.Listener
	apiOn  net.Listener
	tree   *fusefs.Tree // nil for none
	served bool

	// closers undo what was opened, the last first.
	closers []func() error
}

// later notes how to undo what was just done.
func (s *service) later(f func() error) { s.closers = append(s.closers, f) }

// close undoes all that was done, in reverse: so a start that fails leaves
// nothing, and a stop goes from the outside in.
func (s *service) close() error {
	var errs []error
	for _, f := range slices.Backward(s.closers) {
		if err := f(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// open opens everything, from the inside out. Nobody is served yet.
func (s *service) open(ctx context.Context, passed []net.Listener) error {
	if s.set.private != "" {
		s.later(func() error { return os.RemoveAll(s.set.private) })
	}
	if err := s.set.makeDirs(ctx); err != nil {
		return err
	}
	if err := s.lock(ctx); err != nil {
		return err
	}
	pool := store.NewPool()
	s.later(func() error { return within(closeLimit, "close the snapstore", pool.Close) })
	if err := s.openStores(pool); err != nil {
		return err
	}
	s.daemon = newDaemon(s.version, s.log, pool, func(export string) string {
		return exportURI(s.nbdOn[0].Addr(), export)
	})
	if err := s.listen(ctx, passed); err != nil {
		return err
	}
	s.later(s.daemon.closeDevices)
	for _, q := range s.set.devices {
		if _, err := s.daemon.addDevice(q); err != nil {
			return err
		}
	}
	return s.mountTree(ctx)
}

// openStores opens the parts of the snapstore, empty: what a predecessor kept
// in them went with its tables. A start that fails after that takes the files
// away that it has made.
func (s *service) openStores(pool *store.Pool) error {
	for _, spec := range s.set.stores {
		_, err := os.Lstat(spec.Path)
		made := spec.Kind == store.File && errors.Is(err, fs.ErrNotExist)
		part, err := store.Open(spec, s.set.force)
		if err != nil {
			return err
		}
		if made {
			s.later(func() error { return s.unmake(spec.Path) })
		}
		if err := pool.Add(part); err != nil {
			return errors.Join(err, part.Close())
		}
	}
	return pool.Discard()
}

// unmake removes a file that this start has made, unless the daemon has served.
func (s *service) unmake(path string) error {
	if s.served {
		return nil
	}
	return os.Remove(path)
}

// lock locks the run and the state directory.
func (s *service) lock(ctx context.Context) error {
	for _, dir := range slices.Compact([]string{s.set.run, s.set.state}) {
		l, err := lockDir(ctx, dir, s.set.control, stopWait)
		if err != nil {
			return err
		}
		s.later(l.unlock)
	}
	return nil
}

// listen opens the sockets. Clients that connect already wait until we serve.
func (s *service) listen(ctx context.Context, passed []net.Listener) error {
	var err error
	if s.apiOn, err = listenUnix(ctx, s.set.control); err != nil {
		return err
	}
	s.later(closeOnce(s.apiOn))
	if s.nbdOn = passed; passed != nil {
		return nil
	}
	for _, uri := range s.set.listen {
		l, err := listenNBD(ctx, uri)
		if err != nil {
			return err
		}
		s.nbdOn = append(s.nbdOn, l)
		s.later(closeOnce(l))
	}
	return nil
}

// closeOnce closes l, which its server may have closed before.
func closeOnce(l net.Listener) func() error {
	return func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

func (s *service) mountTree(ctx context.Context) (err error) {
	if s.set.mount == "" {
		return nil
	}
	s.tree, err = fusefs.Mount(ctx, treeSource{s.daemon}, fusefs.Options{
		Dir:        s.set.mount,
		Create:     s.set.mountDefault || inBackground(),
		AllowOther: s.set.allowOther,
		Log:        s.log,
	})
	if err != nil {
		return err
	}
	s.daemon.tree = s.tree
	s.later(func() error {
		// Whoever stops us has run out of patience with ctx already.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountLimit)
		defer cancel()
		return s.tree.Unmount(ctx)
	})
	return nil
}
