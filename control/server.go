// The control socket's server.

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxRequest   = 1 << 20          // bytes of a request's body
	maxRequests  = 64               // handled at once; more wait for their turn
	maxFollowers = 64               // of events, at once
	readTimeout  = 10 * time.Second // for a request to arrive
	writeTimeout = 30 * time.Second // for a client to take a reply, or a line of a stream
)

// newServer returns the HTTP server of d's control socket; its streams end with
// ctx. Whoever can connect
// is our own user: sockets are 0600. It still bounds what it takes.
func newServer(ctx context.Context, d *Daemon) *http.Server {
	return &http.Server{
		Handler:           handler(d),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelError),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
}

// connKey is where a request's context has its connection.
type connKey struct{}

// hasLeft says whether the client of a request has closed its connection. The kernel
// knows that at once. ctx ends only when net/http has found it out, and also when we
// stop.
func hasLeft(ctx context.Context) bool {
	c, ok := ctx.Value(connKey{}).(syscall.Conn)
	if !ok {
		return ctx.Err() != nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	fds := []unix.PollFd{{Events: unix.POLLRDHUP}}
	n := 0
	err = raw.Control(func(fd uintptr) {
		fds[0].Fd = int32(fd)
		n, _ = unix.Poll(fds, 0)
	})
	return n > 0 || err != nil // closed by us: net/http has found it out
}

func handler(d *Daemon) http.Handler {
	mux := http.NewServeMux()
	turns := make(chan struct{}, maxRequests)
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			select {
			case turns <- struct{}{}:
				defer func() { <-turns }()
			case <-r.Context().Done():
				return
			}
			reply(w, r, f)
		})
	}
	handle("GET /version", func(*http.Request) (any, error) { return d.versionInfo(), nil })
	handle("GET /devices", func(*http.Request) (any, error) { return d.deviceInfos(), nil })
	handle("GET /devices/{name}", func(r *http.Request) (any, error) { return d.deviceInfo(r.PathValue("name")) })
	handle("POST /devices", func(r *http.Request) (any, error) {
		return body(func(q DeviceRequest) (DeviceInfo, error) { return d.addDevice(r.Context(), q, true) })(r)
	})
	handle("DELETE /devices/{name}", func(r *http.Request) (any, error) { return nil, d.removeDevice(r.PathValue("name")) })
	handle("POST /devices/{name}/resize", func(r *http.Request) (any, error) {
		return body(func(q ResizeRequest) (DeviceInfo, error) { return d.resizeDevice(r.PathValue("name"), q) })(r)
	})
	handle("GET /devices/{name}/cbt", func(r *http.Request) (any, error) { return d.changesInfo(r.PathValue("name")) })
	handle("POST /devices/{name}/cbt/mark", func(r *http.Request) (any, error) {
		return body(func(m MarkRequest) (any, error) { return nil, d.mark(r.PathValue("name"), m.Ranges) })(r)
	})
	handle("POST /devices/{name}/cbt/reset", func(r *http.Request) (any, error) { return nil, d.reset(r.PathValue("name")) })
	handle("GET /snapshots", func(*http.Request) (any, error) { return d.snapshotInfos(), nil })
	handle("GET /snapshots/{name}", func(r *http.Request) (any, error) { return d.snapshotInfo(r.PathValue("name")) })
	handle("POST /snapshots", func(r *http.Request) (any, error) {
		return body(func(q SnapshotRequest) (SnapshotInfo, error) { return d.takeSnapshot(r.Context(), q) })(r)
	})
	handle("POST /snapshots/{name}/rollback", func(r *http.Request) (any, error) {
		return body(func(q RollbackRequest) (RollbackInfo, error) { return d.rollBack(r.Context(), r.PathValue("name"), q) })(r)
	})
	handle("POST /freeze", body(d.checkFreeze))
	handle("POST /snapshots/destroy", body(func(q DestroyRequest) (any, error) { return nil, d.destroySnapshots(q) }))
	handle("POST /store", func(r *http.Request) (any, error) {
		return body(func(q PartRequest) (any, error) { return d.addPart(r.Context(), q) })(r)
	})
	handle("GET /state/check", func(r *http.Request) (any, error) { return d.inspect(r.Context()) })
	handle("GET /store", func(*http.Request) (any, error) { return d.partInfos(), nil })
	mux.HandleFunc("GET /devices/{name}/cbt/extents", d.serveExtents)
	followers := make(chan struct{}, maxFollowers)
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) { d.serveEvents(w, r, followers) })
	return mux
}

// body makes a handler of a function that takes a request's JSON.
func body[Q, A any](f func(Q) (A, error)) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		var q Q
		dec := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxRequest))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&q); err != nil {
			return nil, refuse(syscall.EINVAL, "read request: %v", err)
		}
		return f(q)
	}
}

// reply answers r with what f returns, as JSON.
func reply(w http.ResponseWriter, r *http.Request, f func(*http.Request) (any, error)) {
	http.NewResponseController(w).SetWriteDeadline(time.Time{}) // f may take its time
	answer, err := f(r)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		e, status := wireError(err)
		w.WriteHeader(status)
		answer = map[string]*Error{"error": e}
	}
	json.NewEncoder(w).Encode(answer) // a client that left does not want to know
}

// stream answers with a line of JSON for each value, as they come. Where flush
// is set each line goes out at once.
func stream[T any](w http.ResponseWriter, values iter.Seq2[T, error], flush bool) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	c := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	if flush {
		c.Flush() // the headers: the client knows that it was heard
	}
	for v, err := range values {
		var line any = v
		if err != nil {
			e, _ := wireError(err)
			line = map[string]*Error{"error": e}
		}
		c.SetWriteDeadline(time.Now().Add(writeTimeout))
		if enc.Encode(line) != nil || err != nil || flush && c.Flush() != nil {
			return
		}
	}
}

// serveExtents streams what a copy of a device has to read.
func (d *Daemon) serveExtents(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	extents, err := d.extents(r.PathValue("name"), ExtentsQuery{Since(q.Get("since")), q.Get("at"), q.Get("generation")})
	if err != nil {
		reply(w, r, func(*http.Request) (any, error) { return nil, err })
		return
	}
	stream(w, extents, false)
}

// serveEvents streams events: those that are remembered and, with follow, new
// ones until the client leaves or the daemon stops.
func (d *Daemon) serveEvents(w http.ResponseWriter, r *http.Request, followers chan struct{}) {
	if !r.URL.Query().Has("follow") {
		found, _ := d.events.after(0)
		stream(w, withoutErrors(found), false)
		return
	}
	select {
	case followers <- struct{}{}:
		defer func() { <-followers }()
	default:
		err := refuse(syscall.EBUSY, "%d clients follow the events already", maxFollowers)
		reply(w, r, func(*http.Request) (any, error) { return nil, err })
		return
	}
	stream(w, func(yield func(Event, error) bool) {
		for e := range d.events.follow(r.Context()) {
			if !yield(e, nil) {
				return
			}
		}
	}, true)
}

func withoutErrors[T any](values []T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, v := range values {
			if !yield(v, nil) {
				return
			}
		}
	}
}

// versionInfo says who we are.
func (d *Daemon) versionInfo() VersionInfo {
	return VersionInfo{d.version, os.Getpid(), d.isStopping()}
}

// serveControl answers requests on l until it is closed.
func serveControl(s *http.Server, l net.Listener) error {
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve control socket: %w", err)
	}
	return nil
}
